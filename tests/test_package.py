from __future__ import annotations

import subprocess
import sys

import pytest

import trajshift

TORCH_FREE = (
    "trajshift",
    "trajshift.errors",
    "trajshift.settings",
    "trajshift.algorithm.methods",
    "trajshift.recipes.recipe",
    "trajshift.cli.main",
    "trajshift.data.registry",
)


def test_importing_does_not_import_torch() -> None:
    code = "import sys\n" + "".join(
        f"import {module}\nassert 'torch' not in sys.modules, '{module}'\n" for module in TORCH_FREE
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("name", trajshift.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(trajshift, name) is not None
    assert name in dir(trajshift)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = trajshift.no_such_name


def test_finetune_is_the_function_whatever_was_imported_before() -> None:
    code = """
import importlib, sys
for first in ("trajshift.evaluation.finetuning", "trajshift.runs.evaluate_runs", "trajshift.training.trainer"):
    for name in [name for name in sys.modules if name.partition(".")[0] == "trajshift"]:
        del sys.modules[name]
    importlib.import_module(first)
    import trajshift
    from trajshift import finetune
    assert trajshift.finetune is finetune and callable(finetune), first
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_the_library_needs_torch_numpy_and_safetensors_alone() -> None:
    code = """
import sys
for name in ("pydantic", "yaml", "typer", "rich", "matplotlib", "scipy", "datasets", "PIL", "tensorboard", "jinja2"):
    sys.modules[name] = None
import trajshift, trajshift.data.huggingface, trajshift.evaluation.comparison, trajshift.evaluation.statistics
import trajshift.models, trajshift.runs.evaluate_runs, trajshift.training.checkpoint
from trajshift.evaluation.evaluate import evaluate
from trajshift.data import digits_targets, digits_tasks
model = lambda task: trajshift.models.build_model("conv", task, width=4, depth=1)
trainer = trajshift.MetaTrainer(model, digits_tasks("parity"), horizon=2, rounds=1, batch_size=4)
assert [event.step for event in trainer] == [1, 2]
(target,) = digits_targets("six-to-nine").values()
rows = evaluate({"shifting": {0: trainer.initialization}}, [target], steps=2, batch_size=4)
assert 0.0 <= rows[0].metrics["accuracy"] <= 1.0
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
