"""Errors that a user can fix. This module never imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """Bad input, reported in one sentence that names the thing, the value and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


class NonFiniteLoss(UsageError):
    """A loss became infinite or not a number; names the task, the step and the learning rates."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """Ends a sentence about an unknown `name`: the nearest known one, or the list of all."""
    known = sorted(known)
    close = get_close_matches(str(name), known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known) or 'none'}"
