"""A changed byte is refused by the name of its file; files of version 0.1, without digests, are read."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from trajshift.errors import UsageError
from trajshift.evaluation.evaluation_row import FINAL, EvaluationRow
from trajshift.learners.initialization import METADATA_KEY, Initialization, load_initialization
from trajshift.recipes.recipe import load
from trajshift.runs.collect_rows import FILE, append_evaluation, read_evaluation
from trajshift.runs.directory import RunDirectory
from trajshift.runs.train import train
from trajshift.utils.files import append_row, read_jsonl
from trajshift.utils.seals import seal_file

TINY = ["horizon=6", "rounds=1", "batch_size=4", "threads=1", "model.options.width=4", "train_on=[upright]",
        "output.log_every=2", "output.checkpoint_every=4", "output.tensorboard=false"]  # fmt: skip
draw = random.Random(3)


def phi() -> Initialization:
    numbers = torch.Generator().manual_seed(0)
    tensors = {"a.weight": torch.randn(3, 4, generator=numbers), "b.bias": torch.randn(5, generator=numbers)}
    return Initialization(tensors, {"method": "reptile", "step": 6, "heads": ["fc"], "seed": 0})


def test_every_byte_of_an_initialization_counts(tmp_path: Path) -> None:
    file = phi().save(tmp_path / "phi.safetensors")
    content = file.read_bytes()
    found = load_initialization(file)
    assert found.about == phi().about
    assert found.digest() == phi().digest()
    assert found.to_bytes() == content
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        file.write_bytes(bytes(changed))
        with pytest.raises(UsageError, match=r"phi\.safetensors"):
            load_initialization(file)
    for length in (0, 7, 8, 100, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(UsageError, match=r"phi\.safetensors"):
            load_initialization(file)


def test_files_without_a_digest_are_read(tmp_path: Path) -> None:
    file = tmp_path / "old.safetensors"
    file.write_bytes(save(dict(phi()), {METADATA_KEY: json.dumps(phi().about, sort_keys=True)}))
    assert load_initialization(file).digest() == phi().digest()
    file.write_bytes(save(dict(phi())))
    assert load_initialization(file).about == {}


@pytest.mark.parametrize(
    "about", ["[]", "1", "[" * 5000, '{"step": "x"}', '{"heads": 3}', '{"heads": [1]}', "1" * 5000, "{"]
)
def test_absurd_metadata_is_one_sentence(about: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    file = tmp_path / "initialization.safetensors"
    file.write_bytes(save(dict(phi()), {METADATA_KEY: about}))
    with pytest.raises(UsageError, match="is not a readable safetensors file"):
        load_initialization(file)
    assert RunDirectory(tmp_path).initialization_step() is None


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**63, 2**64 - 1])
def test_absurd_headers_are_one_sentence(length: int, tmp_path: Path) -> None:
    file = tmp_path / "initialization.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{" * 20)
    with pytest.raises(UsageError, match="is not a readable safetensors file"):
        load_initialization(file)
    assert RunDirectory(tmp_path).initialization_step() is None


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at step 4 of 6, as after a kill."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(load("digits", TINY), run, quiet=True)
    shutil.rmtree(run / "checkpoints" / "000000006")
    return run


def test_a_changed_byte_of_the_metrics_stops_a_resume(stopped: Path, tmp_path: Path) -> None:
    content = (stopped / "metrics.jsonl").read_bytes()
    needed = len(b"".join(content.splitlines(keepends=True)[:2]))
    for number in range(12):
        run = shutil.copytree(stopped, tmp_path / str(number))
        place = draw.randrange(needed)
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        (run / "metrics.jsonl").write_bytes(bytes(changed))
        with pytest.raises(UsageError, match=r"metrics\.jsonl is damaged: line [12]"):
            train(load("digits", TINY), run, resume=True, quiet=True)
    run = shutil.copytree(stopped, tmp_path / "good")
    assert train(load("digits", TINY), run, resume=True, quiet=True).complete
    assert (run / "metrics.jsonl").read_bytes() == content
    phis = [load_file(one / "initialization.safetensors") for one in (run, stopped)]
    assert all(torch.equal(phis[0][name], phis[1][name]) for name in phis[0])
    shutil.rmtree(run)
    shutil.copytree(stopped, run)
    seal_file(run / "metrics.jsonl").unlink()  # as version 0.1
    assert train(load("digits", TINY), run, resume=True, quiet=True).complete
    assert (run / "metrics.jsonl").read_bytes() == content


def row(seed: int) -> EvaluationRow:
    return EvaluationRow(start=FINAL, inner_steps=6, method="m", label="m", seed=seed, target="t", steps=3,
                         metrics={"accuracy": 0.25})  # fmt: skip


def test_every_byte_of_an_evaluation_counts(tmp_path: Path) -> None:
    file = tmp_path / FILE
    append_row(file, row(0).to_json())  # as version 0.1, without a digest
    assert read_evaluation(tmp_path) == [row(0)]
    for seed in (1, 2):
        append_evaluation(tmp_path, row(seed))
    rows, content = [row(0), row(1), row(2)], file.read_bytes()
    assert read_evaluation(tmp_path) == rows
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        file.write_bytes(bytes(changed))
        with pytest.raises(UsageError, match=r"evaluation\.jsonl is damaged"):
            read_evaluation(tmp_path)
    file.write_bytes(content[:-9])  # a crash in the middle of a row
    assert read_evaluation(tmp_path) == rows[:2]
    append_evaluation(tmp_path, row(3))
    assert read_evaluation(tmp_path) == [*rows[:2], row(3)]
    file.write_bytes(b"".join(content.splitlines(keepends=True)[1:]))  # a line that the user deleted
    assert read_evaluation(tmp_path) == rows[1:]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"step": ' + b"1" * 5000 + b"}", "too many digits"),
        (b'"\xff"', "UTF-8"),
        (b"{", "line 2"),
        (b"[]", "not a mapping"),
        (b'{"step": true}', "step in line 2 is True"),
        (b'{"step": "' + b"x" * 5000 + b'"}', "step in line 2 is 'xxx"),
        (b"{}", "step in line 2 is None"),
    ],
)
def test_a_row_that_is_none_is_one_sentence_with_file_and_line(line: bytes, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(UsageError) as caught:
        read_jsonl(file, {"step": int})
    assert str(caught.value).startswith(f"{file} is damaged (")
    assert "line 2" in str(caught.value)
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 400
