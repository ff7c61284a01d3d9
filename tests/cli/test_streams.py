"""Streams that are closed, full or plain stop no command, and what is refused is one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trajshift.cli import main

TINY = ["train", "digits", "horizon=2", "rounds=1", "batch_size=4", "threads=1", "model.options.width=4",
        "train_on=[upright]", "output.tensorboard=false"]  # fmt: skip


def trajshift(folder: Path, redirect: str, *words: str, **environment: str) -> tuple[int, str]:
    """Exit status and stderr of a command whose streams are redirected by the shell."""
    command = f'exec {sys.executable} -m trajshift "$@" {redirect}'
    done = subprocess.run(
        ["bash", "-c", command, "-", *words], cwd=folder, capture_output=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment}, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_stdout_is_one_sentence(tmp_path: Path, unbuffered: str) -> None:
    status, told = trajshift(tmp_path, ">/dev/full", "methods", PYTHONUNBUFFERED=unbuffered)
    assert (status, told.count("\n")) == (2, 1)
    assert told.startswith("trajshift: stdout cannot be written (No space left on device)")


def test_training_without_stderr(tmp_path: Path) -> None:
    assert trajshift(tmp_path, "2>&-", *TINY, "--name", "closed")[0] == 0
    assert trajshift(tmp_path, "2>/dev/full >&-", *TINY, "--name", "full")[0] == 0
    for name in ("closed", "full"):
        assert (tmp_path / "runs" / name / "initialization.safetensors").is_file()
    phis = [(tmp_path / "runs" / name / "initialization.safetensors").read_bytes() for name in ("closed", "full")]
    assert phis[0] == phis[1]


def test_no_stderr_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trajshift", *TINY, "--name", "r"])
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as end:
        main.main()
    sys.stderr.close()
    assert not end.value.code


def test_letters_that_an_encoding_lacks(tmp_path: Path) -> None:
    text = ascii("1 \u00b1 2 \u00d7 \u4e2d\udc80")
    code = f"from trajshift.utils.streams import prepare_streams; prepare_streams(); print({text})"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.stdout == b"1 +- 2 x \\u4e2d\\udc80\n"


@pytest.mark.parametrize("command", ["train", "evaluate", "finetune", "report", "sweep"])
def test_a_path_of_260_letters_is_one_sentence(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    before, sys.argv = sys.argv, ["trajshift", command, "x" * 260, *(["meta_lr=1,2"] if command == "sweep" else [])]
    try:
        with pytest.raises(SystemExit) as end:
            main.main()
    finally:
        sys.argv = before
    told = capsys.readouterr().err
    assert (end.value.code, told.count("\n")) == (2, 1)
    assert "name too long" in told
