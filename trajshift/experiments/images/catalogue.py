"""The published image experiments (sections 4.2 and 4.3): which runs each is made of, at which scale.

Every run is a recipe with overrides, so each can also be made by `trajshift train`. Experiments share runs: what one
has trained, the next reuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Arms = Mapping[str, tuple[str, ...]]
"""Name of a run -> what it overrides in the recipe."""

SCALES = ("full", "small", "check")
"""As published; what two cores can finish; a few steps of everything, to check that it runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What the experiments on one recipe have in common."""

    recipe: str
    scales: Mapping[str, tuple[str, ...]]
    """Overrides of each scale; none for `full`."""
    images: Mapping[str, tuple[int, ...]]
    """Numbers of training images per target of a few-data curve, by scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One experiment of the paper."""

    summary: str
    study: Study
    arms: Arms
    by_scale: Mapping[str, Arms] | None = None
    """Arms that depend on the scale, in place of `arms`."""
    checkpoints: bool = False
    """Whether every checkpoint is fine-tuned, for accuracy against inner steps."""
    few_data: bool = False
    """Whether the targets are fine-tuned with several numbers of training images."""


_SIXTEEN = tuple(f"{section}.crop_padding=2" for section in ("data", "tasks.cifar100", "tasks.svhn", "tuning.cifar10"))
IMAGES = Study(
    recipe="images-meta-train",
    scales={
        "full": (),
        "small": (
            *("horizon=200", "rounds=10", "batch_size=32", "data.size=16", *_SIXTEEN, "output.checkpoint_every=400"),
            *("finetune.steps=300", "finetune.batch_size=32", "finetune.train_images=1000", "output.log_every=20"),
        ),
        "check": (
            *("horizon=2", "rounds=2", "batch_size=4", *_SIXTEEN, "output.checkpoint_every=2"),
            *("finetune.steps=2", "finetune.batch_size=4", "finetune.train_images=8", "output.log_every=1"),
        ),
    },
    images={},
)
IMAGENET = Study(
    recipe="imagenet-continue",
    scales={
        "full": (),
        "small": (
            *("horizon=50", "rounds=4", "meta_lr=0.02", "batch_size=32", "data.size=32", "data.crop_padding=4"),
            *("finetune.steps=200", "finetune.batch_size=32", "output.checkpoint_every=50", "output.log_every=10"),
        ),
        "check": (
            *("horizon=2", "rounds=1", "meta_lr=0.5", "batch_size=2", "data.size=null", "data.crop_padding=1"),
            *("finetune.steps=1", "finetune.batch_size=2", "finetune.train_images=8", "output.log_every=1"),
        ),
    },
    images={"full": (500, 1000, 2000, 5000), "small": (250, 500, 1000, 2000), "check": (4, 8)},
)
SHIFTING: Arms = {"trajectory-shifting": ()}
REPTILE: Arms = {"reptile": ("method=reptile", "meta_lr=1")}
_TIN = "tasks={tinyimagenet: {source: 'cache:tinyimagenet'}}"


def _plain(*methods: str) -> Arms:
    return {method: (f"method={method}",) for method in methods}


def _horizons(own: int, pairs: Sequence[tuple[int, int]]) -> Arms:
    """Both methods at each (horizon, rounds); with the scale's own horizon they are the runs of the others."""
    return {
        name if horizon == own else f"{name}-K{horizon}": (*fields, f"horizon={horizon}", f"rounds={rounds}")
        for horizon, rounds in pairs
        for name, fields in {**SHIFTING, **REPTILE}.items()
    }


EXPERIMENTS: dict[str, Published] = {
    "images-meta-train": Published(
        summary="Figure 6 (a, b): training loss, and all methods after meta-training on eight image sets.",
        study=IMAGES,
        arms={
            **SHIFTING,
            **REPTILE,
            **_plain("leap", "fomaml", "fomaml++", "imaml", "mtl"),
            "tinyimagenet-only": ("method=single-task", _TIN),
        },
    ),
    "images-meta-test": Published(
        summary="Figure 7: accuracy on five image sets against inner steps of meta-training.",
        study=IMAGES,
        arms={**SHIFTING, **REPTILE, **_plain("leap", "fomaml++")},
        checkpoints=True,
    ),
    "images-horizon": Published(
        summary="Figure 6 (c, d): K = 10, 100 and 1000 at equal total steps.",
        study=IMAGES,
        arms={},
        by_scale={
            "full": _horizons(1_000, [(10, 20_000), (100, 2_000), (1_000, 200)]),
            "small": _horizons(200, [(20, 100), (200, 10), (1_000, 2)]),
            "check": _horizons(2, [(1, 4), (2, 2), (4, 1)]),
        },
    ),
    "images-ablation": Published(
        summary="Figure 8: no shifting and random shifting against shifting and Reptile.",
        study=IMAGES,
        arms={**SHIFTING, **_plain("no-shifting", "random-shifting"), **REPTILE},
        checkpoints=True,
    ),
    "imagenet-continue": Published(
        summary="Table 1: from ImageNet weights, nine targets of 1,000 training images.",
        study=IMAGENET,
        arms={**SHIFTING, **REPTILE, "mtl": ("method=mtl", "meta_lr=null")},
    ),
    "imagenet-few-data": Published(
        summary="Figure 9: gain over ImageNet weights against the number of training images.",
        study=IMAGENET,
        arms={**SHIFTING, **REPTILE},
        few_data=True,
    ),
}
