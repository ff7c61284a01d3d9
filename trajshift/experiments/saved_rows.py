"""Measured pieces of an experiment, one row each; a damaged row is measured again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trajshift.utils.terminal import console


def saved_rows(file: Path) -> dict[Any, dict[str, Any]]:
    """The rows of a .jsonl file by their `key` (a list becomes a tuple); a missing file has none.

    A half-written last line is left out, and so, with a note, is a line that is not an object with a key: its piece
    is measured again.
    """
    found, damaged = {}, []
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            key = row["key"]
            found[tuple(key) if isinstance(key, list) else key] = row
        except (ValueError, TypeError, KeyError):
            damaged.append(str(number))
    if damaged:
        console().print(f"note: {file} is damaged in line {', '.join(damaged)}; measured again", soft_wrap=True)
    return found
