"""Files: atomic writes, rows of JSON, errors of a full disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trajshift.errors import UsageError
from trajshift.utils.streams import output_failure

MAX_HEADER = 100_000_000
"""Bytes of the longest header that the safetensors format allows."""


def parsed_json(text: str | bytes) -> Any:
    """A JSON value.

    Raises:
        ValueError: says why in a few words, whatever is wrong: not JSON, too deep, too many digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from None
    except UnicodeDecodeError:
        raise ValueError("cannot decode it as UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        raise ValueError("a number has too many digits") from None


def safetensors_header(path: Path) -> bytes:
    """The JSON at the beginning of a safetensors file.

    Raises:
        ValueError: the length that it states cannot be right.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(MAX_HEADER, os.fstat(file.fileno()).st_size - 8):
            raise ValueError("its header is longer than the file")
        return file.read(length)


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Adds one row; a half-written last line left by a crash is cut off first."""
    with open(file, "ab+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # two commands may fine-tune from one run; released when closed
        stream.seek(0)
        whole = stream.read().rfind(b"\n") + 1
        stream.truncate(whole)
        stream.write((json.dumps(row) + "\n").encode())


def read_jsonl(file: Path, fields: Mapping[str, Any] = MappingProxyType({})) -> list[dict[str, Any]]:
    """The complete rows of a .jsonl file; a half-written last line is left out, and a missing file has none.

    Args:
        file: one mapping per line.
        fields: what every row must have: field -> type, or a tuple of types.

    Raises:
        UsageError: the file is damaged; says where, and what to do.
    """
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = parsed_json(line)
        except ValueError as error:
            raise UsageError(f"{file} is damaged (line {number}: {error}); fix or delete the line") from None
        if fault := _fault(row, fields, number):
            raise UsageError(f"{file} is damaged ({fault}); fix or delete the line")
        rows.append(row)
    return rows


def _fault(row: Any, fields: Mapping[str, Any], number: int) -> str | None:
    """What a row lacks, in a few words; None where it has these fields."""
    if not isinstance(row, dict):
        return f"line {number} is not a mapping"
    for name, kind in fields.items():
        value = row.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            return f"{name} in line {number} is {shortened(repr(value))}"
    return None


def shortened(text: str, length: int = 80) -> str:
    """A text of at most about `length` letters, for a sentence."""
    return text if len(text) <= length else f"{text[:length]}..."


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file, and the folder for it, so that a crash leaves the old or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    write_to_disk(beside, content.encode() if isinstance(content, str) else content)
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """`replace_file` with a JSON value, one line for each entry."""
    replace_file(path, json.dumps(value, indent=1) + "\n")


def write_to_disk(path: Path, content: bytes | memoryview) -> None:
    """Write a file and wait until it is on the disk; a crash meanwhile may leave only part of it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def disk_errors(path: Path, *, option: str = "output.directory", again: str | None = None) -> Iterator[None]:
    """Report in one sentence that a disk is full or not writable, whichever library noticed.

    `option` names what chooses the folder, `again` the command that resumes; by default those of `trajshift train`.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and output_failure(probe=True) is not None:
            raise  # not the disk, but what stdout goes to
        text = str(error)
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in text or "os error 28" in text:
            raise UsageError(
                f"no space left on the disk of {path}; free some and continue with: "
                f"{again or f'trajshift train --resume {path}'}"
            ) from error
        refused = (
            errno.EACCES,
            errno.EROFS,
            errno.EPERM,
            errno.ENOTDIR,
            errno.EEXIST,
            errno.ENOENT,
            errno.EISDIR,
            errno.ENAMETOOLONG,
            errno.ELOOP,
        )
        if code in refused or "os error 13" in text:  # as safetensors words it
            raise UsageError(f"cannot write to {path}: {text}; choose another {option}") from error
        raise
