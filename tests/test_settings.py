"""Options are stated once: the same in Python, in recipes and in what is trained; old names lead to the new ones."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

import trajshift
from tests.helpers.learners import ConvNet, image_tasks
from tests.helpers.toys import model, tasks
from trajshift import Carry, Execution, Finetune, Inner, Meta, MetaGradient, MetaTrainer, UsageError, finetune
from trajshift.evaluation.evaluate import evaluate
from trajshift.learners.inner_optimizer import optimizer_for
from trajshift.recipes.build_trainer import build_trainer, finetune_options, with_own_objects
from trajshift.recipes.recipe import Recipe, builtin_names, flatten, load, to_yaml, validate
from trajshift.recipes.short_names import in_short_names
from trajshift.runs.resume import fingerprint
from trajshift.runs.sweep import parse_grid
from trajshift.settings import RENAMED, SECTIONS, SHORT_NAMES, Optimization, finetune_settings

TINY = {"horizon": 2, "rounds": 1, "batch_size": 4}
PAPER = {"momentum": 0.9, "weight_decay": 5e-4}


def trainer(**options: Any) -> MetaTrainer:
    return MetaTrainer(model, tasks(2), **TINY, **options)


# -- one default everywhere ----------------------------------------------------------------------------------


def test_the_inner_default_is_the_papers_wherever_it_is_left_out() -> None:
    recipe = load("digits", ["threads=null", "train_on=[upright,turned]"])
    assert Inner().options == Inner(lr=0.02).options == Inner(optimizer=torch.optim.SGD).options == PAPER
    assert signature(MetaTrainer).parameters["inner"].default == Inner()
    assert recipe.inner == Inner(lr=0.02)
    assert validate({"tasks": {"a": {"source": "digits:upright"}}}).inner == Inner()
    for made in (trainer(), trainer(inner=Inner(lr=0.02)), build_trainer(recipe)):
        made.advance()
        for learner in made.learners:
            assert PAPER.items() <= learner.optimizer.param_groups[0].items()
    assert Inner(optimizer="adam").options == Inner(options={}).options == {}
    assert Inner(optimizer=lambda parameters, lr: torch.optim.SGD(parameters, lr=lr)).options == {}


def test_every_default_of_a_section_is_that_of_recipes_and_of_the_trainer() -> None:
    recipe = Recipe(tasks=load("digits").tasks)
    for name, section in SECTIONS.items():
        assert getattr(recipe, name) == section()
        assert asdict(getattr(recipe, name)) == asdict(validate({"tasks": {"a": {"source": "digits:upright"}}}))[name]
    for name in ("inner", "meta", "execution"):
        assert signature(MetaTrainer).parameters[name].default == SECTIONS[name]()
    arguments = signature(MetaTrainer).parameters
    for entry in fields(Recipe):
        if entry.name in arguments and entry.name not in {*SECTIONS, "model", "tasks", "renew"}:
            assert arguments[entry.name].default == entry.default, entry.name


def test_the_finetuning_default_is_the_papers_wherever_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Optimization] = []
    monkeypatch.setattr(
        "trajshift.evaluation.finetuning.optimizer_for",
        lambda settings, parameters: (seen.append(settings), optimizer_for(settings, parameters))[1],
    )
    target = replace(image_tasks((2,))[0], test=image_tasks((2,))[0].train)
    finetune(None, target, model=ConvNet, steps=1)
    finetune(None, target, Finetune(steps=1), model=ConvNet)
    evaluate({"scratch": {0: None}}, [target], model=ConvNet, steps=1)
    evaluate({"scratch": {0: None}}, [target], model=ConvNet, settings=Finetune(steps=1))
    assert seen == [Finetune(steps=1)] * 4
    assert Finetune().options == {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    options = finetune_options(recipe := load("digits"))
    assert options["settings"] == recipe.finetune == Finetune(steps=60, batch_size=32, lr=0.05)


def test_sections_are_frozen_and_own_their_values() -> None:
    given: dict[str, Any] = {"momentum": 0.5}
    inner = Inner(options=given, milestones=(0.5,))
    given["momentum"] = 0.1
    assert (inner.options, inner.milestones) == ({"momentum": 0.5}, [0.5])
    inner.arguments["momentum"] = 0.2
    assert inner.arguments == {"momentum": 0.5}
    with pytest.raises(FrozenInstanceError):
        inner.lr = 1.0  # type: ignore[misc]


def test_settings_need_no_torch_and_no_yaml() -> None:
    code = (
        "import sys, trajshift; from trajshift import Execution, Finetune, Inner, Meta; "
        "Inner(), Meta(), Execution(), Finetune(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'yaml', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- in Python -----------------------------------------------------------------------------------------------

OLD = [
    ("meta_lr", 0.01, "meta=Meta(lr=0.01)"),
    ("meta_every", 5, "meta=Meta(every=5)"),
    ("metagrad", "implicit", "meta=Meta(gradient='implicit')"),
    ("metagrad_options", {"strength": 2.0}, "meta=Meta(gradient_options={'strength': 2.0})"),
    ("carry", "hold", "meta=Meta(carry='hold')"),
    ("adapt", "head", "meta=Meta(adapt='head')"),
    ("batch", "heldout", "meta=Meta(batch='heldout')"),
    ("meta_optimizer", "adam", "meta=Meta(optimizer='adam')"),
    ("meta_options", {"eps": 1e-6}, "meta=Meta(options={'eps': 1e-06})"),
    ("grad_clip", 1.0, "inner=Inner(grad_clip=1.0)"),
    ("device", "cuda", "execution=Execution(device='cuda')"),
    ("engine", "loop", "execution=Execution(engine='loop')"),
    ("autocast", torch.bfloat16, "execution=Execution(autocast=torch.bfloat16)"),
    ("channels_last", False, "execution=Execution(channels_last=False)"),
    ("workers", 2, "execution=Execution(workers=2)"),
    ("overlap", True, "execution=Execution(overlap=True)"),
    ("threads", 1, "execution=Execution(threads=1)"),
    ("gauge", None, "error_meter=None"),
]


@pytest.mark.parametrize(("name", "value", "new"), OLD)
def test_an_old_argument_names_its_new_spelling(name: str, value: object, new: str) -> None:
    with pytest.raises(UsageError) as caught:
        trainer(**{name: value})
    assert str(caught.value) == f"MetaTrainer no longer takes {name}; write {new}"


def test_every_old_argument_is_tried() -> None:
    assert {name for name, _, _ in OLD} == SHORT_NAMES.keys() | RENAMED.keys()


def test_old_arguments_of_one_section_are_put_together() -> None:
    with pytest.raises(UsageError) as caught:
        trainer(meta_lr=0.1, meta_every=1, device="cpu", carry=type("Own", (Carry,), {"__call__": None})())
    assert str(caught.value) == (
        "MetaTrainer no longer takes meta_lr and meta_every and carry and device; "
        "write meta=Meta(lr=0.1, every=1, carry=...), execution=Execution(device='cpu')"
    )


def test_unknown_arguments_name_the_nearest() -> None:
    with pytest.raises(UsageError, match="MetaTrainer has no argument 'horizn'; did you mean 'horizon'"):
        MetaTrainer(model, tasks(2), horizn=3)
    with pytest.raises(UsageError, match="finetune has no argument 'step'; did you mean 'steps'"):
        finetune(None, tasks(1)[0], step=3)
    with pytest.raises(UsageError, match="finetune has no argument 'evaluate_ever'; did you mean 'evaluate_every'"):
        finetune(None, tasks(1)[0], evaluate_ever=3)


def test_a_section_of_another_type_is_refused() -> None:
    with pytest.raises(UsageError, match=r"inner is of type dict; write inner=Inner\(\.\.\.\)"):
        trainer(inner={"lr": 0.1})
    with pytest.raises(UsageError, match=r"meta is of type Inner; write meta=Meta\(\.\.\.\)"):
        trainer(meta=Inner())
    with pytest.raises(UsageError, match=r"given a dict as settings; use trajshift\.Finetune"):
        finetune(None, tasks(1)[0], {"steps": 3})  # type: ignore[arg-type]


def test_fields_beside_settings_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        finetune(None, tasks(1)[0], Finetune(steps=300), steps=200)
    assert str(caught.value) == (
        "finetune was given steps twice, as 300 in a Finetune, which states every field, and as steps=200; "
        "use dataclasses.replace(settings, steps=200)"
    )


def test_fields_and_settings_are_the_same() -> None:
    assert finetune_settings(None, {"steps": 7, "lr": 0.5}) == finetune_settings(Finetune(steps=7, lr=0.5), {})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Inner(lr=0.0), "inner.lr is 0.0; use a positive number"),
        (lambda: Inner(grad_clip=-1.0), "inner.grad_clip is -1.0; use a positive number"),
        (
            lambda: Inner(milestones=[2.0]),
            "inner.milestones contains 2.0; each must be a fraction of the steps, from 0 to 1",
        ),
        (lambda: Inner(schedule="cosin"), "inner.schedule is 'cosin', which is unknown; did you mean 'cosine'?"),
        (lambda: Meta(lr=-1.0), "meta.lr is -1.0; use a positive number"),
        (lambda: Execution(engine="lop"), "execution.engine is 'lop', which is unknown; did you mean 'loop'?"),
        (lambda: Execution(autocast="bfloat"), "execution.autocast is 'bfloat', which is unknown"),
        (lambda: Execution(workers=-1), "execution.workers is -1; it must be at least 0"),
        (lambda: Execution(threads=0), "execution.threads is 0; it must be at least 1 thread"),
        (lambda: Finetune(steps=-1), "finetune.steps is -1; it must be at least 0 steps"),
        (lambda: Finetune(factor=0.0), "finetune.factor is 0.0; use a positive number"),
        (lambda: Finetune(running_stats="rest"), "finetune.running_stats is 'rest', which is unknown; did you mean"),
    ],
)
def test_values_are_checked_when_a_section_is_made(make: Any, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("autocast", ["bfloat16", torch.bfloat16])
def test_autocast_takes_names_and_types(autocast: object) -> None:
    assert trainer(execution=Execution(autocast=autocast)).meta_step.autocast is torch.bfloat16  # type: ignore[arg-type]


def test_threads_are_set() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        trainer()
        assert torch.get_num_threads() != before
        trainer(execution=Execution(threads=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# -- in recipes ----------------------------------------------------------------------------------------------

VALUES: dict[str, tuple[str, Any]] = {
    "meta_lr": ("0.5", 0.5),
    "meta_every": ("2", 2),
    "metagrad": ("path_length", "path_length"),
    "metagrad_options": ("{norm: false}", {"norm": False}),
    "carry": ("hold", "hold"),
    "adapt": ("all", "all"),
    "batch": ("train", "train"),
    "grad_clip": ("2.5", 2.5),
    "device": ("cuda", "cuda"),
    "engine": ("loop", "loop"),
    "autocast": ("bfloat16", "bfloat16"),
    "channels_last": ("true", True),
    "workers": ("3", 3),
    "overlap": ("true", True),
    "threads": ("2", 2),
}


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_both_names_of_a_field_are_read(name: str, tmp_path: Path) -> None:
    text, value = VALUES[name]
    method = "fomaml" if name in ("adapt", "batch") else "reptile"
    start = f"horizon: 4\nmethod: {method}\ntasks: {{a: {{source: 'digits:upright'}}}}\n"
    section, _, field = SHORT_NAMES[name].partition(".")
    (tmp_path / "old.yaml").write_text(f"{start}{name}: {text}\n")
    (tmp_path / "new.yaml").write_text(f"{start}{section}: {{{field}: {text}}}\n")
    (tmp_path / "both.yaml").write_text(f"{start}{name}: {text}\n{section}: {{{field}: {text}}}\n")
    (tmp_path / "none.yaml").write_text(start)
    expected = load(tmp_path / "new.yaml")
    assert getattr(getattr(expected, section), field) == value
    assert load(tmp_path / "old.yaml") == load(tmp_path / "both.yaml") == expected
    for word in (f"{name}={text}", f"{SHORT_NAMES[name]}={text}"):
        assert load(tmp_path / "none.yaml", [word]) == expected
    assert flatten(expected)[SHORT_NAMES[name]] == in_short_names(flatten(expected))[name] == value
    (tmp_path / "printed.yaml").write_text(to_yaml(expected))
    assert load(tmp_path / "printed.yaml") == expected
    assert f"\n{name}:" not in (tmp_path / "printed.yaml").read_text()


def test_a_field_with_two_values_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text("meta_lr: 0.1\nmeta: {lr: 0.2}\ntasks: {a: {source: 'digits:upright'}}\n")
    with pytest.raises(UsageError) as caught:
        load(path)
    assert str(caught.value) == "two.yaml: meta_lr is 0.1 and meta.lr is 0.2, but they are one field; keep meta.lr"
    for words in (["meta_lr=1", "meta.lr=2"], ["meta.lr=2", "meta_lr=1"]):
        with pytest.raises(UsageError, match=r"set one field by two names; give one of them"):
            load("digits", words)
    with pytest.raises(UsageError, match="set one field by two names"):
        load("digits", ["metagrad_options.norm=true", "meta.gradient_options.norm=false", "metagrad=path_length"])
    assert load("digits", ["meta_lr=1", "meta.lr=1"]).meta.lr == 1
    assert load("digits", ["meta_lr=1", "meta_lr=2"]).meta.lr == 2
    with pytest.raises(UsageError, match="meta_lr is given twice"):
        parse_grid(["meta_lr=1,2", "meta.lr=3,4"])


def test_an_override_by_one_name_replaces_a_value_by_the_other(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("meta_lr: 0.1\ndevice: cuda\ntasks: {a: {source: 'digits:upright'}}\n")
    recipe = load(path, ["meta.lr=0.2", "execution.device=cpu"])
    assert (recipe.meta.lr, recipe.execution.device) == (0.2, "cpu")


def test_unknown_fields_name_the_nearest_of_both_spellings() -> None:
    for word, nearest in (("devise=cpu", "device"), ("meta_rl=1", "meta_lr"), ("execution.devise=cpu", "device")):
        with pytest.raises(UsageError, match=f"did you mean '{nearest}'"):
            load("digits", [word])


FINGERPRINTS = {
    "digits": "bfdeedbf167b0be3",
    "imagenet-continue": "fe47a3b53c145f4d",
    "images-meta-train": "c8a898c36e7cf3c4",
    "recommended": "35eaa6dff9ddc07d",
    "small-images": "02f4c56cfb7efbd4",
}


@pytest.mark.parametrize("name", builtin_names())
def test_fingerprints_are_those_of_version_0_1(name: str) -> None:
    """Checkpoints hold them, with the path of an initialization: a run that 0.1 began resumes."""
    recipe = load(name)
    assert fingerprint(recipe, recipe.initialization) == FINGERPRINTS[name]


# -- objects of the user's own -------------------------------------------------------------------------------


class Scaled(MetaGradient):
    """The displacement times a strength."""

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def read(self, view: Any) -> torch.Tensor:
        return self.strength * (view.phi - view.theta)


class Still(Carry):
    """theta stays where it is."""

    def __call__(self, view: Any, delta: torch.Tensor) -> None:
        pass


HERE = "tests.test_settings"


def test_a_recipe_names_objects_of_ones_own() -> None:
    words = [
        "train_on=[upright,turned]", "horizon=3", "rounds=1", "batch_size=4", "seed=1",
        f"meta.gradient={HERE}:Scaled", "meta.gradient_options.strength=0.5", f"meta.carry={HERE}:Still", "meta_lr=0.4",
    ]  # fmt: skip
    recipe = load("digits", words)
    assert load("digits", [word.replace("meta.gradient", "metagrad") for word in words]) == recipe
    named = build_trainer(recipe)
    built_in = build_trainer(load("digits", [*words[:5], "method=no-shifting", "meta_lr=0.2"]))
    for made in (named, built_in):
        list(made)
    described = named.describe()
    assert (described["metagrad"], described["carry"]) == ("Scaled", "Still")
    torch.testing.assert_close(named.meta_step.phi, built_in.meta_step.phi, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("meta", "sentence"),
    [
        (Meta(gradient=f"{HERE}:Still"), "meta.gradient 'tests.test_settings:Still' returned a Still; return a "),
        (Meta(carry=f"{HERE}:Scaled"), "meta.carry 'tests.test_settings:Scaled' returned a Scaled; return a "),
        (Meta(gradient=f"{HERE}:Scaled", gradient_options={"x": 1}), "could not be called with {'x': 1}"),
        (Meta(carry=f"{HERE}:trainer"), "could not be called without arguments|returned a MetaTrainer"),
        (Meta(gradient=f"{HERE}:Scald"), "has no 'Scald'"),
    ],
)
def test_what_makes_no_such_object_is_refused(meta: Meta, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        with_own_objects(meta)
    assert any(part in str(caught.value) for part in sentence.split("|"))


def test_the_sections_are_public() -> None:
    assert {trajshift.Inner, trajshift.Meta, trajshift.Execution, trajshift.Finetune} == set(SECTIONS.values())
