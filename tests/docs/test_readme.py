from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_the_python_example_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(row[0]) for row in printed[:-2]] == [50, 100, 150, 200]
    assert all(0.0 <= float(row[0]) <= 1.0 for row in printed[-2:])
    assert (tmp_path / "initialization.safetensors").is_file()


def test_the_recipe_example_is_valid(tmp_path: Path) -> None:
    from trajshift.recipes.recipe import load

    (text,) = blocks("yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    recipe = load(path, ["meta_lr=0.1"])
    assert set(recipe.tasks) == {"a", "signs", "pets"}
    assert recipe.tasks["signs"].flip is False
