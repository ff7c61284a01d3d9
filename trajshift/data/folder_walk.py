"""One reading of a folder of images: its tree, links followed, and what was passed over, by reason."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trajshift.errors import UsageError

ANNOTATIONS = (".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".md", ".html")
TABLES = (".parquet", ".arrow")
ARCHIVES = (".tar", ".zip", ".gz", ".zst")
# Formats that Pillow registers but only recognizes: it cannot decode them.
_STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
# Formats whose first bytes tell; others would match almost any file without a known extension.
_RECOGNIZED = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "HEIF", "JPEG2000", "PPM", "PSD")
_DEEPEST = 8
NOT_AN_IMAGE = "no image that Pillow opens"


@dataclass(slots=True)
class Folder:
    """What one folder contains, links followed."""

    path: str
    images: list[str] = field(default_factory=list)
    folders: dict[str, Folder] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    """Files that might be meant as images, but that Pillow does not open."""

    def all_images(self) -> Iterator[str]:
        """Every image, at any depth."""
        yield from self.images
        for inner in self.folders.values():
            yield from inner.all_images()

    def with_images(self) -> dict[str, Folder]:
        """The folders in this one that contain images at any depth."""
        return {name: inner for name, inner in self.folders.items() if next(inner.all_images(), None) is not None}


class Walk:
    """One reading of a folder: its tree, and what was passed over."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = os.path.abspath(Path(folder).expanduser())
        self.passed: dict[str, list[str]] = defaultdict(list)
        self.tables = 0
        self.archives = 0
        self._extensions = _pillow_extensions()
        self.root = self._read(self.folder, ())

    def name(self, path: str) -> str:
        """A path as seen from the folder."""
        return os.path.relpath(path, self.folder)

    def notes(self) -> tuple[str, ...]:
        """What was passed over, with counts by reason, in at most one sentence."""
        if not self.passed:
            return ()
        parts = []
        for reason, paths in sorted(self.passed.items()):
            names = ", ".join(map(self.name, sorted(paths)[:3])) + (", ..." if paths[3:] else "")
            parts.append(f"{reason}: {len(paths)} ({names})")
        total = sum(map(len, self.passed.values()))
        return (f"{self.folder}: {total} {'entry is' if total == 1 else 'entries are'} not used: {'; '.join(parts)}",)

    def pass_over(self, images: Collection[str], reason: str) -> None:
        """Count images that are not used."""
        if images:
            self.passed[reason].extend(images)

    def has_class_folders(self) -> bool:
        """Whether there are class folders where the documented layouts have them."""
        folders = self.root.with_images()
        inner = folders["train"].with_images() if "train" in folders else {}
        return any(sum(bool(kind.images) for kind in kinds.values()) > 1 for kinds in (folders, inner))

    def has_other_data(self) -> bool:
        """Whether there are files that `datasets` may read instead of images: archives, or lines of JSON or CSV."""
        rows = (".csv", ".json", ".jsonl", ".tsv")
        return self.archives > 0 or any(path.lower().endswith(rows) for path in self.passed.get("annotations", ()))

    def _read(self, path: str, above: tuple[str, ...]) -> Folder:
        found, here = Folder(path), (*above, os.path.realpath(path))
        try:
            with os.scandir(path) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror}); make it readable, or remove it") from error
        for name in names:
            inner = os.path.join(path, name)
            if name.startswith("."):
                self.passed["hidden"].append(inner)
            elif os.path.isdir(inner):
                if os.path.realpath(inner) in here:
                    self.passed["links to a folder that contains them"].append(inner)
                elif len(here) > _DEEPEST:
                    self.passed[f"folders more than {_DEEPEST} deep"].append(inner)
                else:
                    found.folders[name] = self._read(inner, here)
            elif self._is_image(name, inner, found):
                found.images.append(inner)
        return found

    def _is_image(self, name: str, path: str, found: Folder) -> bool:
        extension = os.path.splitext(name)[1].lower()
        if not os.path.isfile(path):
            self.passed["broken links" if os.path.islink(path) else "not regular files"].append(path)
        elif extension in ANNOTATIONS or (extension in TABLES and name.startswith("metadata.")):
            self.passed["annotations"].append(path)
        elif extension in TABLES:
            self.tables += 1
        elif extension in self._extensions or _recognized(path):
            return True
        else:
            self.archives += extension in ARCHIVES
            self.passed[NOT_AN_IMAGE].append(path)
            found.unread.append(path)
        return False


def _pillow_extensions() -> frozenset[str]:
    """Extensions of the formats that the installed Pillow decodes."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError(
            f"folders of images need {error.name}, which is not installed; pip install 'trajshift[data]'"
        ) from error
    return frozenset(
        extension
        for extension, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _STUBS
    )


def _recognized(path: str) -> bool:
    """Whether a file without a known extension is an image by its first bytes."""
    from PIL import Image

    try:
        with Image.open(path, formats=[kind for kind in _RECOGNIZED if kind in Image.OPEN]):
            return True
    except Exception:  # whatever Pillow makes of bytes that are no image
        return False
