from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from trajshift.errors import UsageError
from trajshift.recipes.recipe import SECTIONS, Recipe, builtin_names, differences, flatten, load, to_yaml, validate
from trajshift.recipes.sections import DataRecipe, TaskRecipe
from trajshift.runs.resume import check_boundary, fingerprint, resumed_recipe
from trajshift.runs.sweep import Result, choose, edges, parse_grid
from trajshift.settings import Optimization

SMALL = """
horizon: 10
rounds: 2
meta_lr: 1e-3
tasks:
  mnist: {source: "npz:mnist.npz", flip: false}
  clothes: {source: "npz:clothes.npz"}
targets:
  birds: {source: "hf:some/birds"}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("name", builtin_names())
def test_builtin_recipes_survive_being_printed(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    again = load(tmp_path / "again.yaml")
    assert again.data.root == str(tmp_path / recipe.data.root)
    again.data.root = recipe.data.root
    assert again == recipe


def test_data_root_is_relative_to_the_file_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project" / "sub").mkdir(parents=True)
    (tmp_path / "project" / "mine.yaml").write_text(SMALL + "data: {root: pictures}\n")
    (tmp_path / "project" / "bare.yaml").write_text(SMALL)
    (tmp_path / "project" / "elsewhere.yaml").write_text(SMALL + "data: {root: /srv/pictures}\n")
    monkeypatch.chdir(tmp_path / "project" / "sub")
    pictures = tmp_path / "project" / "pictures"
    for where in ("../mine.yaml", tmp_path / "project" / "mine.yaml"):
        assert Path(load(where).data.root).resolve() == pictures
    assert Path(load("../bare.yaml").data.root).resolve() == tmp_path / "project"
    assert load("../elsewhere.yaml").data.root == "/srv/pictures"
    assert load("../mine.yaml", ["data.root=here"]).data.root == "here"  # the shell's own paths
    assert load("small-images").data.root == "."
    monkeypatch.chdir(tmp_path / "project")
    assert load("mine.yaml").data.root == "pictures"
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(SMALL)
    assert load(run).data.root == "."  # a run of an old version, continued from where it was started


def test_every_field_is_printed_and_documented() -> None:
    recipe = load("digits")
    assert set(yaml.safe_load(to_yaml(recipe))) == {entry.name for entry in fields(Recipe)}
    for section in (Recipe, TaskRecipe, Optimization, *SECTIONS.values()):
        tree = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for entry, after in pairwise(tree.body):
            if isinstance(entry, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{ast.unparse(entry)} has no docstring"


def test_numbers_in_scientific_notation_are_numbers(recipe_file: Path) -> None:
    assert load(recipe_file).meta.lr == 1e-3
    assert load(recipe_file, ["inner.lr=2e-2", "inner.options.weight_decay=1E-4"]).inner.lr == 2e-2


def test_overrides(recipe_file: Path) -> None:
    recipe = load(
        recipe_file,
        ["tasks.mnist.flip=true", "tasks.clothes=null", "tasks.new.source=digits:upright", "data.mean=[0.1,0.2,0.3]"],
    )
    assert recipe.tasks["mnist"].flip is True
    assert list(recipe.tasks) == ["mnist", "new"]
    assert recipe.data.mean == [0.1, 0.2, 0.3]


def test_an_option_is_added_to_the_default_ones(recipe_file: Path) -> None:
    recipe = load(recipe_file, ["inner.options.momentum=0.5"])
    assert recipe.inner.options == {"momentum": 0.5, "weight_decay": 5e-4}
    assert load(recipe_file, ["inner.optimizer=adam"]).inner.options == {}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("methd=reptile", ["unknown field 'methd'", "did you mean 'method'"]),
        ("inner.lrr=1", ["unknown field 'lrr' in inner", "did you mean 'lr'"]),
        ("tasks.mnist.flp=false", ["unknown field 'flp' in tasks.mnist", "did you mean 'flip'"]),
        ("tasks.mnst.flip=false", ["unknown task 'mnst'", "did you mean 'mnist'"]),
        ("tasks.mnst=null", ["unknown task 'mnst'", "did you mean 'mnist'"]),
        ("train_on=[mnit]", ["train_on", "'mnit'", "did you mean 'mnist'"]),
        ("method=reptil", ["unknown method 'reptil'", "did you mean 'reptile'"]),
        ("horizon=0", ["horizon is 0"]),
        ("horizon=1.5", ["horizon is 1.5", "valid integer"]),
        ("horizon=true", ["horizon is True", "valid integer"]),
        ("rounds=0", ["rounds is 0"]),
        ("meta_every=3", ["meta_every is 3", "does not divide"]),
        ("meta_every=20", ["meta_every is 20"]),
        ("meta_lr=-1", ["meta.lr is -1"]),
        ("inner.lr=fast", ["inner.lr is 'fast'", "valid number"]),
        ("data.mean=[1,x]", ["data.mean", "valid number"]),
        ("data.size=0", ["data: size is 0"]),
        ("data.channels=2", ["data: channels is 2"]),
        ("tasks.mnist.weight=0", ["tasks.mnist: weight is 0"]),
        ("tasks.mnist.source=npx:a.npz", ["tasks.mnist", "unknown kind", "did you mean 'npz'"]),
        ("tasks.mnist.source=mnist", ["tasks.mnist", "no kind"]),
        ("tasks.mnist=3", ["tasks.mnist is 3", "mapping"]),
        ("tasks={}", ["no tasks"]),
        ("targets.mnist.source=npz:a.npz", ["target 'mnist'", "trained"]),
        ("renew=[head]", ["renew", "did you mean 'heads'"]),
        ("finetune.running_stats=rest", ["finetune", "did you mean 'reset'"]),
        ("finetune.milestones=[2]", ["finetune", "milestones contains 2"]),
        ("method=single-task", ["single-task", "train_on"]),
        ("adapt=head", ["adapt head"]),
        ("output.name=a/b", ["output", "name is 'a/b'"]),
        ("inner.lr.x=1", ["inner.lr"]),
        ("meta_lr", ["'meta_lr'", "key.path=value"]),
        ("=1", ["key.path=value"]),
    ],
)
def test_mistakes_are_named(recipe_file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load(recipe_file, [override])
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", ["not valid YAML", "line"]),
        ("- 1", ["not a mapping"]),
        ("", ["not a mapping"]),
        ("horizon: 1\nhorizon: 2\n", ["'horizon' is given twice"]),
        ("tasks: {a b: {source: npz:x}}", ["task name 'a b'"]),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load(path)
    for word in ["bad.yaml", *words]:
        assert word in str(caught.value)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no recipe 'digts'.*did you mean 'digits'"):
        load("digts")


def test_a_folder_without_a_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"without recipe\.yaml"):
        load(tmp_path)


def test_differences_name_dotted_fields(recipe_file: Path) -> None:
    old = load(recipe_file)
    new = load(recipe_file, ["inner.options.momentum=0.5", "tasks.mnist.flip=true", "output.keep=1"])
    assert differences(old, new) == ["inner.options", "tasks.mnist.flip", "output.keep"]
    assert flatten(old)["tasks.mnist.source"] == "npz:mnist.npz"


def test_what_a_resumed_run_may_change(recipe_file: Path) -> None:
    old = load(recipe_file)
    more = resumed_recipe(old, load(recipe_file, ["rounds=5", "output.log_every=7"]), Path("run"))
    assert more.rounds == 5
    for override in ("seed=1", "inner.lr=0.5", "batch_size=3", "finetune.steps=3", "model.options={width: 3}"):
        field = override.split("=")[0].replace(".", r"\.")
        with pytest.raises(UsageError, match=f"started with another recipe: {field} was"):
            resumed_recipe(old, load(recipe_file, [override]), Path("run"))
    other = load(recipe_file, ["tasks.clothes=null"])
    check_boundary(old, resumed_recipe(old, other, Path("run")), step=10)
    with pytest.raises(UsageError, match=r"tasks\.clothes.*only between rounds"):
        check_boundary(old, other, step=7)
    with pytest.raises(UsageError, match="complete"):
        check_boundary(old, other, step=20)
    with pytest.raises(UsageError, match="already done"):
        check_boundary(old, load(recipe_file, ["rounds=1"]), step=15)


def test_a_resumed_run_keeps_its_name_and_threads(recipe_file: Path) -> None:
    old = load(recipe_file, ["threads=1", "output.name=mine"])
    new = resumed_recipe(old, load(recipe_file), Path("run"))
    assert (new.execution.threads, new.output.name) == (1, "mine")


def test_the_fingerprint_is_of_what_must_not_change(recipe_file: Path) -> None:
    base = fingerprint(load(recipe_file))
    same = ["rounds=9", "output.keep=9", "data.root=elsewhere", "tasks.clothes=null", "threads=2"]
    assert fingerprint(load(recipe_file, same)) == base
    assert fingerprint(load(recipe_file, ["seed=1"])) != base


def test_python_recipes_are_checked_too() -> None:
    with pytest.raises(UsageError, match="size"):
        DataRecipe(size=0)
    with pytest.raises(UsageError, match="source"):
        TaskRecipe()
    with pytest.raises(UsageError, match=r"recipe: tasks\.a: "):
        validate({"tasks": {"a": {}}})


# sweep ------------------------------------------------------------------------------------------------------


def test_grid_words() -> None:
    assert parse_grid(["seed=0,1", "train_on=[a,b],[c]"]) == {"seed": ["0", "1"], "train_on": ["[a,b]", "[c]"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["meta_lr=1"], "several values"),
        (["meta_lr=1,1"], "repeated"),
        (["meta_lr=1,,2"], "empty"),
        (["meta_lr=1,2", "meta_lr=3,4"], "given twice"),
        (["meta_lr"], "key.path=value"),
    ],
)
def test_bad_grids(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_grid(words)


def result(value: float | None, **point: str) -> Result:
    return Result(point=tuple(sorted(point.items())), value=value, seeds=1, inner_steps=10)


def test_the_choice_is_made_for_each_method_and_says_where_it_lies() -> None:
    results = [
        result(0.2, method="reptile", meta_lr="0.1"),
        result(0.4, method="reptile", meta_lr="1"),
        result(0.3, method="reptile", meta_lr="3e0"),
        result(0.5, method="leap", meta_lr="0.1"),
        result(0.4, method="leap", meta_lr="1"),
        result(None, method="leap", meta_lr="3e0"),
    ]
    choices = choose(results)
    assert dict(choices["reptile"].point)["meta_lr"] == "1"
    assert edges(choices["reptile"], results) == []
    assert len(edges(choices["leap"], results)) == 1
    assert "smallest" in edges(choices["leap"], results)[0]


def test_losses_are_better_the_lower() -> None:
    results = [result(-0.5, meta_lr="1"), result(-0.1, meta_lr="2"), result(-0.3, meta_lr="3")]
    assert dict(choose(results)[""].point) == {"meta_lr": "2"}
