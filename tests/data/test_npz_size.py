"""An .npz file that claims or unpacks to more than memory should hold is refused by its size, before it is read."""

from __future__ import annotations

import io
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from trajshift.data.npz import load_npz
from trajshift.errors import UsageError


def header(shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return out.getvalue()


def good(path: Path) -> Path:
    x, y = np.zeros((4, 8, 8, 3), dtype=np.uint8), np.arange(4) % 2
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    return path


def test_a_header_that_claims_terabytes(tmp_path: Path) -> None:
    file = good(tmp_path / "a.npz")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("extra.npy", header((2**20, 1024, 1024, 3)))  # 3 TiB
    with pytest.raises(UsageError, match=r"take 3,072\.0 GiB unpacked, and at most 4 GiB .*max_gib"):
        load_npz(file)


def test_an_archive_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    file, began = good(tmp_path / "a.npz"), time.monotonic()
    block = bytes(2**24)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("class_names.npy", header((2**26,)) + 4 * block)
    with pytest.raises(UsageError, match=r"GiB unpacked, and at most 0\.05 GiB"):
        load_npz(file, max_gib=0.05)
    assert time.monotonic() - began < 20


def test_the_limit_is_an_option(tmp_path: Path) -> None:
    from trajshift.recipes.build_tasks import build_task
    from trajshift.recipes.sections import DataRecipe, TaskRecipe

    file = good(tmp_path / "a.npz")
    task = TaskRecipe(source=f"npz:{file}", options={"max_gib": 1e-6})
    with pytest.raises(UsageError, match=r"take 0\.0 GiB"):
        build_task("a", task, DataRecipe())
    assert build_task("a", TaskRecipe(source=f"npz:{file}", options={"max_gib": 1}), DataRecipe()).outputs == 2
