from __future__ import annotations

import subprocess
import sys

import pytest

import trajshift

TORCH_FREE = ("trajshift", "trajshift.errors", "trajshift.presets", "trajshift.recipe", "trajshift.cli")


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", trajshift.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(trajshift, name) is not None
    assert name in dir(trajshift)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = trajshift.no_such_name


@pytest.mark.parametrize("first", ["trajshift.finetune", "trajshift.evaluate", "trajshift.loop"])
def test_finetune_is_the_function_whatever_was_imported_before(first: str) -> None:
    code = (
        f"import {first}, trajshift; from trajshift import finetune; "
        "assert trajshift.finetune is finetune and callable(finetune)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
