"""Packs the images that training needs into folders small enough to be carried to the GPU's machine.

    python -m studies.regime.pack DATA FOLDER [--size native]     # writes FOLDER/images-1 and FOLDER/images-2

Of the sources the training images, at their size, and one test image stay; of mnist everything. `studies.regime.train`
reads the same tensors from the files of both folders, laid together, as from DATA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from studies.command import new_app, run_app
from studies.regime.setting import SIZE_FILE, SOURCES, TUNING, Size, parse_size, show_size
from trajshift.data.npz import load_npz
from trajshift.data.sources import ArraySource, Source
from trajshift.errors import UsageError
from trajshift.utils.files import replace_file

FOLDERS = 2
LIMIT = 52
"""MiB of a folder: 64 travel in one call, and the checkout is one of them."""


def pack_one(name: str, data: Path, folder: Path, size: Size) -> int:
    """Writes one file; returns its bytes."""
    images = load_npz(data / f"{name}.npz", size=size)
    arrays: dict[str, np.ndarray] = {}
    for split, source in (("train", images.train), ("test", images.test)):
        x, y = pixels_and_labels(source)
        last = len(y) if split == "train" or name == TUNING else 1
        arrays |= {f"x_{split}": x[:last], f"y_{split}": y[:last]}
    file = folder / f"{name}.npz"
    arrays["class_names"] = np.array(images.class_names)
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy's types take a name for allow_pickle
    return file.stat().st_size


def pixels_and_labels(source: Source | None) -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, H, W, C]` and labels `[N]` of a source in memory."""
    assert isinstance(source, ArraySource)
    pixels, labels = source.tree
    return pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels.numpy()


app = new_app()


@app.command()
def pack(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder of the .npz files.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the packed folders go.")],
    size: Annotated[str, typer.Option(help="Pixels of all images, or native: each task's own.")] = "32",
) -> None:
    """Pack the images of the sources and of mnist for a GPU's machine."""
    pixels = parse_size(size)
    packed = [folder / f"images-{number}" for number in range(1, FOLDERS + 1)]
    for place in packed:
        if place.exists() and any(place.iterdir()):
            raise UsageError(f"{place} is not empty; delete it or name another FOLDER")
        replace_file(place / SIZE_FILE, show_size(pixels) + "\n")
    filled = dict.fromkeys(packed, 0)
    by_length = sorted((*SOURCES, TUNING), key=lambda name: -file_bytes(data / f"{name}.npz"))
    for name in by_length:
        place = min(packed, key=filled.__getitem__)
        filled[place] += pack_one(name, data, place, pixels)
    for place, size_in_bytes in filled.items():
        print(f"{place}: {size_in_bytes / 2**20:.1f} MiB")
        if size_in_bytes > LIMIT * 2**20:
            raise UsageError(f"{place} has more than {LIMIT} MiB, more than one call can carry")


def file_bytes(file: Path) -> int:
    """How long a file is.

    Raises:
        UsageError: there is none.
    """
    if not file.is_file():
        raise UsageError(f"there is no file {file}; name the folder of the .npz files")
    return file.stat().st_size


if __name__ == "__main__":
    run_app(app, "studies.regime.pack")
