"""Names in the literature -> the four choices of the one loop. This module never imports torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from trajshift.errors import UsageError, nearest

METAGRADS = ("displacement", "last_gradient", "path_length", "implicit")
CARRIES = ("shift", "hold", "random", "replay")
ADAPTS = ("all", "head")
_WITHOUT_BATCH = ("displacement", "path_length")

_SHIN = "Shin et al., ICML 2021"


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One combination of meta-gradient x cadence x carry x adapt, with its defaults."""

    name: str
    summary: str
    """One line for `trajshift methods`."""
    reference: str
    metagrad: str
    """Which direction phi moves: one of `METAGRADS`."""
    meta_every: int | str
    """Inner steps between meta-updates: a number, `horizon` for K, or `tenth` for K / 10 (1 where 10 does not divide
    K)."""
    carry: str = "hold"
    """What the running theta does once phi has moved: one of `CARRIES`."""
    adapt: str = "all"
    """Which parameters the inner step moves: one of `ADAPTS`."""
    batch: str = "train"
    """Where last-gradient and implicit meta-gradients are taken: `train` or `heldout` batches of the task."""
    meta_lr: float | None = None
    """Default meta-learning rate; None: min(1, 10 * meta_every / K), the published meta_lr * K = 10."""
    joint: bool = False
    """Joint training: phi is moved by the inner optimizer itself, with its learning rate and options."""
    single: bool = False
    """Exactly one task is allowed."""

    def cadence(self, horizon: int) -> int:
        """Inner steps between two meta-updates at this horizon K."""
        if self.meta_every == "horizon":
            return horizon
        if self.meta_every == "tenth":
            return horizon // 10 if horizon % 10 == 0 else 1
        if not isinstance(self.meta_every, int):
            raise UsageError(
                f"meta_every of method {self.name} is {self.meta_every!r}; use a number, 'horizon' or 'tenth'"
            )
        return self.meta_every

    def default_meta_lr(self, horizon: int, meta_every: int) -> float:
        """The meta-learning rate where the user names none: 10/K for shifting, 1.0 for Reptile."""
        return min(1.0, 10.0 * meta_every / horizon) if self.meta_lr is None else self.meta_lr


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedMethod(Method):
    """A method at a known horizon, with the user's choices filled in and invalid combinations rejected.

    `metagrad` and `carry` name what runs: one of the names above, or the class of a custom object.
    """

    meta_every: int
    """Inner steps between meta-updates, a divisor of the horizon."""


def _table() -> dict[str, Method]:
    shifting = Method(
        name="trajectory-shifting",
        summary="phi moves at every inner step and every running trajectory is shifted with it",
        reference=f"{_SHIN}, Algorithm 2",
        metagrad="displacement",
        meta_every=1,
        carry="shift",
    )
    fomaml = Method(
        name="fomaml",
        summary="phi follows the last inner gradient of each trajectory",
        reference="Finn et al., ICML 2017 (first-order MAML)",
        metagrad="last_gradient",
        meta_every="horizon",
        meta_lr=0.1,
    )
    joint = Method(
        name="mtl",
        summary="multi-task learning: joint gradient of all tasks, one head each",
        reference=f"Caruana, 1997; baseline of {_SHIN}",
        metagrad="last_gradient",
        meta_every=1,
        carry="shift",
        adapt="head",
        joint=True,
    )
    methods = (
        shifting,
        replace(
            shifting,
            name="accurate",
            carry="replay",
            summary="as trajectory shifting, but each trajectory is run again from every new phi",
            reference=f"{_SHIN}, section 4.1 (Ours Accurate)",
        ),
        replace(
            shifting,
            name="no-shifting",
            carry="hold",
            summary="ablation: phi moves at every inner step, the trajectories stay where they are",
            reference=f"{_SHIN}, figure 8",
        ),
        replace(
            shifting,
            name="random-shifting",
            carry="random",
            summary="ablation: each trajectory is shifted in a random direction of the same norm",
            reference=f"{_SHIN}, figure 8",
        ),
        Method(
            name="reptile",
            summary="phi moves towards the end points of the trajectories, then all restart",
            reference="Nichol et al., 2018",
            metagrad="displacement",
            meta_every="horizon",
            meta_lr=1.0,
        ),
        fomaml,
        replace(
            fomaml,
            name="fomaml++",
            meta_every="tenth",
            summary="FOMAML with gradients accumulated along the trajectory (multi-step loss)",
            reference="Antoniou et al., ICLR 2019",
        ),
        Method(
            name="imaml",
            summary="implicit meta-gradient (I + H/lambda)^-1 g by conjugate gradients",
            reference="Rajeswaran et al., NeurIPS 2019",
            metagrad="implicit",
            meta_every="horizon",
            meta_lr=0.1,
            batch="heldout",
        ),
        Method(
            name="leap",
            summary="phi follows the gradient of the length of the paths on the loss surface",
            reference="Flennerhag et al., ICLR 2019",
            metagrad="path_length",
            meta_every="horizon",
            meta_lr=0.1,
        ),
        replace(
            fomaml,
            name="anil",
            adapt="head",
            summary="FOMAML whose inner steps adapt only the head",
            reference="Raghu et al., ICLR 2020",
        ),
        joint,
        replace(
            joint,
            name="single-task",
            single=True,
            summary="plain pre-training on one source task",
            reference=f"baseline of {_SHIN} (TIN-only + fine-tuning)",
        ),
    )
    return {method.name: method for method in methods}


METHODS: dict[str, Method] = _table()
"""Every row of the paper's comparison, by name."""


def resolve(
    method: str | Method,
    *,
    horizon: int,
    meta_every: int | None = None,
    carry: str | None = None,
    adapt: str | None = None,
    metagrad: str | None = None,
    batch: str | None = None,
) -> ResolvedMethod:
    """A preset with the user's choices filled in and its cadence resolved to a number.

    Raises:
        UsageError: an unknown name, a cadence that does not fit the horizon, or an invalid combination.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise UsageError(f"unknown method {method!r}{nearest(method, METHODS)}")
        method = METHODS[method]
    if horizon < 1:
        raise UsageError(f"horizon is {horizon}; a trajectory needs at least 1 inner step")
    metagrad = metagrad or method.metagrad
    own_batch = "train" if metagrad in _WITHOUT_BATCH else method.batch
    chosen = {
        "meta_every": method.cadence(horizon) if meta_every is None else meta_every,
        "carry": carry or method.carry,
        "adapt": adapt or method.adapt,
        "metagrad": metagrad,
        "batch": batch or own_batch,
    }
    mixed = ResolvedMethod(**{**asdict(method), **chosen})
    for name, known in (
        ("metagrad", METAGRADS),
        ("carry", CARRIES),
        ("adapt", ADAPTS),
        ("batch", ("train", "heldout")),
    ):
        value = getattr(mixed, name)
        if value not in known:
            raise UsageError(f"unknown {name} {value!r}{nearest(value, known)}")
    _refuse_invalid(mixed, horizon)
    return mixed


def _refuse_invalid(method: ResolvedMethod, horizon: int) -> None:
    every = method.meta_every
    if every < 1 or every > horizon:
        raise UsageError(f"meta_every is {every}; use a number from 1 to the horizon, {horizon}")
    if horizon % every:
        raise UsageError(f"meta_every is {every}, which does not divide the horizon {horizon}; use a divisor of it")
    if method.adapt == "head" and method.metagrad != "last_gradient":
        raise UsageError(
            f"metagrad {method.metagrad} with adapt head: the shared parameters never leave phi inside a round, "
            "so there is nothing to measure; use metagrad last_gradient or adapt all"
        )
    if method.adapt == "head" and method.carry == "random" and every < horizon:
        raise UsageError(
            "carry random with adapt head: only noise would separate theta from phi; use carry shift, replay or hold"
        )
    if method.metagrad in _WITHOUT_BATCH and method.batch == "heldout":
        raise UsageError(
            f"metagrad {method.metagrad} takes no gradient of its own, so batch heldout would have no effect; drop it"
        )
    if method.joint and (method.adapt, method.carry, method.metagrad, every) != (
        "head",
        "shift",
        "last_gradient",
        1,
    ):
        raise UsageError(f"{method.name} is joint training: it allows no other metagrad, carry, adapt or meta_every")
