"""Seals of rows: `FILE.sha256` beside `FILE` has a digest of every row that was written, to notice a changed one.

The digest is written before its row: after a crash there may be a digest without a row, never a row without one. Rows
of a file without digests, as version 0.1 wrote it, are accepted, and get theirs when the next row is added.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from trajshift.errors import UsageError
from trajshift.utils.files import replace_file


def seal_file(file: Path) -> Path:
    """Where the digests of a file's rows are."""
    return file.with_name(file.name + ".sha256")


def seal(row: bytes) -> str:
    """The digest of a row, its line end included."""
    return sha256(row).hexdigest()[:32]


def add_seal(file: Path, row: bytes) -> None:
    """Note the digest of a row that is about to be added to `file`, and those of its rows where there are none yet."""
    beside = seal_file(file)
    if not beside.exists():
        renew_seals(file)
    with open(beside, "ab+") as stream:
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)  # half of a line, left by a crash
        stream.write(f"{seal(row)}\n".encode())


def renew_seals(file: Path) -> None:
    """Write the digests of the complete rows that are in the file."""
    replace_file(seal_file(file), "".join(f"{seal(row)}\n" for row in _rows(file) if row.endswith(b"\n")))


def check_seals(file: Path, length: int | None = None) -> None:
    """Compare the rows of a file, or of its first `length` bytes, with their digests.

    Raises:
        UsageError: names the file and the line of the first row that was changed.
    """
    try:
        known = {*seal_file(file).read_text(encoding="utf-8", errors="replace").splitlines()}
    except FileNotFoundError:
        return
    for number, row in enumerate(_rows(file, length), 1):
        # Without its line end a row is half-written, unless it is whole and only the end was changed.
        changed = seal(row) not in known if row.endswith(b"\n") else seal(row[:-1] + b"\n") in known
        if changed:
            raise UsageError(
                f"{file} is damaged: line {number} is not the one that was written; put the file back, or delete the "
                f"line, or delete {seal_file(file).name} if you changed the line yourself"
            )


def _rows(file: Path, length: int | None = None) -> Iterable[bytes]:
    data = file.read_bytes()[:length] if file.is_file() else b""
    *rows, tail = data.split(b"\n")
    return [*(row + b"\n" for row in rows), *([tail] if tail else [])]
