"""The later studies of results/images: which method at which horizon is searched, and what goes to the targets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from studies.images.rows import RATES as FINETUNE_LRS


@dataclass(frozen=True, kw_only=True)
class Study:
    """One method at one horizon: where its search starts, and how many seeds are fine-tuned on the targets."""

    name: str
    method: str
    horizon: int = 200
    steps: int = 2000
    inner_lr: float = 0.02
    meta_lr: float | None = None
    strength: float | None = None
    """iMAML's lambda; the others have none."""
    order: tuple[str, ...] = ()
    """The rates searched, one after the other; empty if the rates of an earlier study are used."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    overrides: tuple[str, ...] = ()
    images: tuple[int, ...] = (250, 1000)
    finetune_lrs: tuple[float, ...] = FINETUNE_LRS
    every: int | None = None
    """Also fine-tunes the targets from phi each time this many inner steps are done."""
    candidate: bool = False
    """Scored on mnist at these rates, as one of the candidates of results/images/README.md."""
    variant: str | None = None
    """One of variants.py."""
    pair: str | None = None
    """Two sources of PAIRS in place of all eight."""


EARLY = Study(
    name="early",
    method="trajectory-shifting",
    meta_lr=0.1,
    steps=1000,
    images=(1000,),
    finetune_lrs=(0.1,),
    every=200,
)
CANDIDATE = Study(name="candidate", method="trajectory-shifting", meta_lr=0.1, seeds=(), candidate=True)
THREE = (0, 1, 2)
META_FIRST = ("meta_lr", "inner_lr", "meta_lr")
PAIRS = {"alike": "tinyimagenet_a,tinyimagenet_b", "unlike": "tinyimagenet_a,kannada_mnist"}
"""By the cosines of conflict.py, the highest and the lowest with tinyimagenet_a."""
AT_32 = ("data.size=32", "data.crop_padding=4", "autocast=bfloat16")
STUDIES = (
    *(replace(EARLY, name=f"early-{seed}", seeds=(seed,)) for seed in range(5)),
    Study(name="single-task", method="single-task", order=("inner_lr",), overrides=("train_on=[tinyimagenet_a]",)),
    Study(name="horizon-1000", method="trajectory-shifting", horizon=1000, meta_lr=0.02, order=("meta_lr",)),
    Study(name="horizon-20", method="trajectory-shifting", horizon=20, meta_lr=1.0, order=("meta_lr",)),
    Study(name="accurate", method="accurate", horizon=20, steps=200, meta_lr=0.2, seeds=THREE),
    Study(name="horizon-20-short", method="trajectory-shifting", horizon=20, steps=200, meta_lr=0.2, seeds=THREE),
    Study(
        name="single-task-long",
        method="single-task",
        steps=16000,
        inner_lr=0.01,
        overrides=("train_on=[tinyimagenet_a]",),
    ),
    Study(name="random-shifting", method="random-shifting", meta_lr=0.05, order=("inner_lr", "meta_lr")),
    Study(name="leap", method="leap", meta_lr=0.5, order=META_FIRST),
    Study(name="fomaml++", method="fomaml++", meta_lr=0.1, order=META_FIRST),
    Study(name="fomaml", method="fomaml", meta_lr=1.0, order=META_FIRST),
    Study(name="imaml", method="imaml", meta_lr=1.0, strength=0.1, order=("strength", *META_FIRST)),
    Study(name="anil", method="anil", meta_lr=1.0, order=META_FIRST),
    Study(name="reptile-horizon-1000", method="reptile", horizon=1000, meta_lr=2.0, order=("meta_lr",)),
    Study(name="reptile-horizon-20", method="reptile", horizon=20, meta_lr=2.0, order=("meta_lr",)),
    Study(name="size-32", method="trajectory-shifting", meta_lr=0.1, overrides=AT_32),
    Study(name="reptile-size-32", method="reptile", meta_lr=2.0, overrides=AT_32),
    *(
        replace(study, name=f"{study.method}-{pair}", pair=pair, seeds=THREE)
        for pair in PAIRS
        for study in (
            Study(name="", method="trajectory-shifting", meta_lr=0.1, order=("meta_lr",)),
            Study(name="", method="reptile", meta_lr=2.0, order=("meta_lr",)),
            Study(name="", method="mtl", inner_lr=0.2, order=("inner_lr",)),
        )
    ),
    replace(CANDIDATE, name="shifting every 5 steps", meta_lr=0.5, overrides=("meta_every=5",)),
    replace(CANDIDATE, name="shifting, horizon grows", variant="growing-horizon"),
    replace(CANDIDATE, name="shifting, heads renewed", overrides=("renew=[heads]",)),
    replace(CANDIDATE, name="shifting, optimizer renewed", overrides=("renew=[optimizer]",)),
    replace(CANDIDATE, name="shifting, heads first", variant="heads-first"),
    replace(CANDIDATE, name="shifting, tasks weighted by loss", variant="weights-by-loss"),
)
