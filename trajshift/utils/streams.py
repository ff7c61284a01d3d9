"""stdout and stderr as they may be: closed, full, or without letters such as the plus-minus sign."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import suppress
from typing import TextIO

_PLAIN = {
    "\u00b1": "+-", "\u00d7": "x", "\u2026": "...", "\u2013": "-", "\u2014": "-", "\u2212": "-", "\u00b7": "-",
    "\u2265": ">=", "\u2264": "<=", "\u2192": "->", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
    "\u2501": "=", "\u2500": "-", "\u2502": "|", "\u2022": "*", "\u00b5": "u",
}  # fmt: skip
"""What is written instead, where an encoding lacks a letter; other letters are escaped."""


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    plain = "".join(_PLAIN.get(one) or one.encode("ascii", "backslashreplace").decode() for one in letters)
    return plain, error.end


def prepare_streams() -> None:
    """Give a closed stdout or stderr to the null device, and let no letter stop a command that has done its work.

    With a closed descriptor the next file that is opened would get its number, and every message with it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        continue
    os.close(descriptor)
    codecs.register_error("trajshift", _replaced)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="trajshift")


def say(text: str) -> None:
    """Print a line to stderr; a stream that cannot be written stops nothing."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def output_failure(*, probe: bool = False) -> OSError | None:
    """Why stdout cannot be written; None where it can. `probe` writes an empty line where nothing is waiting."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
            if probe:
                os.write(sys.stdout.fileno(), b"\n")
    except ValueError:  # closed, or without a descriptor
        pass
    except OSError as error:
        return error
    return None


def settle_streams() -> None:
    """Drop what a full stream does not take, which Python would complain about at the end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _drop(stream)
        except (ValueError, AttributeError):
            continue


def _drop(stream: TextIO) -> None:
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()
