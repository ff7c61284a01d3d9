"""The known traps of flat rows, and what happens at round boundaries."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.learners import (
    DOUBLE,
    ConvNet,
    Text,
    everything,
    image_data,
    image_tasks,
    make,
    named_theta,
    run,
    same_bits,
    text_tasks,
)
from trajshift import Inner, Task, UsageError
from trajshift.algorithm.meta_gradients import LastGradient, MetaGradient
from trajshift.errors import NonFiniteLoss
from trajshift.training.checkpoint import load, save

# -- rows are views --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["conv", "text"])
def test_other_rows_do_not_reach_a_tasks_gradient(model: str) -> None:
    tasks, factory = (image_tasks(), ConvNet) if model == "conv" else (text_tasks(), Text)
    trainer = run(make("trajectory-shifting", tasks, factory), 2)
    for learner in trainer.learners:
        gradients = []
        for poison in (False, True):
            loss = learner.forward(learner.batches.train(2))
            kept = trainer.theta.clone()
            if poison:
                others = [row for row in range(len(trainer.learners)) if row != learner.row]
                trainer.theta[others] = torch.nan
            loss.backward()
            trainer.theta.copy_(kept)
            gradients.append({name: p.grad for name, p in {**learner.shared, **learner.own}.items()})
            learner.forget_gradients()
        assert same_bits(*gradients)
        assert all(gradient.isfinite().all() for gradient in gradients[1].values())


def test_parameters_are_views_at_addresses_that_never_change() -> None:
    trainer = run(make("trajectory-shifting", image_tasks(), horizon=2, rounds=3), 1)
    addresses = [p.data_ptr() for learner in trainer.learners for p in learner.shared.values()]
    assert all(address % 256 == trainer.theta.data_ptr() % 256 for address in addresses)
    run(trainer)
    assert addresses == [p.data_ptr() for learner in trainer.learners for p in learner.shared.values()]
    assert trainer.layout.count == sum(tensor.numel() for tensor in trainer.initialization.values())


@pytest.mark.parametrize("how", ["to", "channels_last", "assign", "assign head", "new parameter"])
def test_views_that_were_detached_are_refused_at_the_next_round(how: str) -> None:
    trainer = run(make("trajectory-shifting", image_tasks(), horizon=2, rounds=3), 4 if how == "to" else 3)
    module = trainer.learners[1].module
    if how == "to":
        module.to(torch.float32)
    elif how == "channels_last":
        module.to(memory_format=torch.channels_last)
    elif how == "assign":
        module.load_state_dict({name: t.clone() for name, t in module.state_dict().items()}, assign=True)
    elif how == "assign head":
        head = {name: t.clone() for name, t in module.state_dict().items() if name.startswith("fc")}
        module.load_state_dict(head, assign=True, strict=False)
    else:
        module.body[1].weight = nn.Parameter(module.body[1].weight.data.clone())
    with pytest.raises(UsageError, match=r"of task 'images1' .*do not call \.to\(\)"):
        run(trainer)


def test_values_loaded_in_place_are_fine() -> None:
    trainer = run(make("trajectory-shifting", image_tasks()), 2)
    module = trainer.learners[1].module
    module.load_state_dict({name: t.clone() for name, t in module.state_dict().items()})
    run(trainer)


def test_mixed_dtypes_are_refused() -> None:
    class Mixed(ConvNet):
        def __init__(self, task: Task) -> None:
            super().__init__(task)
            self.extra = nn.Parameter(torch.zeros(2, dtype=torch.float32))

    with pytest.raises(UsageError, match=r"mixed dtypes \(torch.float32, torch.float64\)"):
        make("reptile", image_tasks(), Mixed)


def test_channels_last_weights_keep_their_strides_and_give_the_same_run(tmp_path: Path) -> None:
    class Wide(ConvNet):
        def __init__(self, task: Task, last: bool) -> None:
            super().__init__(task)
            self.body.insert(3, nn.Conv2d(4, 4, 3, dtype=DOUBLE))
            if last:
                self.to(memory_format=torch.channels_last)

    plain, last = (run(make("trajectory-shifting", image_tasks(), partial(Wide, last=x))) for x in (False, True))
    weight = last.learners[0].module.body[3].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    for name, tensor in plain.initialization.items():
        torch.testing.assert_close(last.initialization[name], tensor, rtol=1e-10, atol=1e-11)
        assert last.initialization[name].is_contiguous()
    build = partial(make, "trajectory-shifting", image_tasks(), partial(Wide, last=True))
    save(tmp_path, run(build(), 3).meta_step)
    resumed = build()
    load(tmp_path / "000000003", resumed.meta_step)
    assert same_bits(everything(run(resumed)), everything(last))


# -- passes that leave no trace --------------------------------------------------------------------------------


def test_passes_touch_no_statistics_counters_or_generator() -> None:
    trainer = run(make("imaml", image_tasks(), partial(ConvNet, dropout=0.4)), 2)
    before = everything(trainer)
    buffers = [buffer for learner in trainer.learners for buffer in learner.module.buffers()]
    state = torch.random.get_rng_state()
    probe = trainer.meta_step.passes()
    losses = probe.losses()
    assert torch.equal(losses, probe.losses())  # dropout draws what the training pass drew
    for split in ("train", "heldout"):
        probe.gradients_at_end(split)
    with probe.hessian(0) as product:
        product(torch.ones_like(trainer.phi))
    assert probe.counts["gradient_evaluations"] == 3 + 3 + 3 + 3 + 1 + 2
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same_bits(everything(trainer), before)
    after = [buffer for learner in trainer.learners for buffer in learner.module.buffers()]
    assert all(a is b for a, b in zip(buffers, after, strict=True))
    assert all(p.grad is None for learner in trainer.learners for p in learner.module.parameters())


def test_a_pass_on_the_last_training_batch_sees_what_the_step_saw() -> None:
    model = partial(ConvNet, dropout=0.4)
    trainer = make("fomaml", image_tasks(), model, inner=Inner(lr=1e-300, options={}))  # theta stays where it is
    for _ in range(3):
        event = trainer.advance()
    followed = trainer.meta_step.active.gradients.clone()
    probe = trainer.meta_step.passes()
    assert torch.equal(probe.losses(), event.losses)
    assert torch.equal(probe.gradients_at_end("train"), followed)


def test_dropout_draws_follow_seed_task_and_step() -> None:
    masks: dict[int, list[bytes]] = {}

    def model(task: Task, seed: int) -> nn.Module:
        module = ConvNet(task, dropout=0.5)
        hook = lambda part, inputs, out: masks[seed].append((out == 0).numpy().tobytes())  # noqa: E731
        module.body[5].register_forward_hook(hook)
        return module

    for seed in (0, 1):
        masks[seed] = []
        tasks = [Task(name=name, train=image_data(5, 2), outputs=2) for name in ("a", "b")]
        run(make("accurate", tasks, partial(model, seed=seed), seed=seed, horizon=3, rounds=1))
        # Steps 1, 1 2, 1 2 3 of both tasks: what a replay draws is what was drawn before.
        (a1, b1), replayed, (a2, b2) = masks[seed][:2], masks[seed][2:4], masks[seed][4:6]
        assert replayed == [a1, b1]
        assert masks[seed][6:10] == [a1, b1, a2, b2]
        assert len({a1, b1, a2, b2}) == 4
    assert not set(masks[0]) & set(masks[1])


def test_a_pass_that_fails_puts_everything_back() -> None:
    tasks = image_tasks()
    trainer = run(make("fomaml", tasks, batch="heldout"), 2)
    before = everything(trainer)
    tasks[2].loss = lambda module, batch: module(batch[0]).sum() / "nonsense"
    with pytest.raises(TypeError):
        trainer.meta_step.passes().gradients_at_end("heldout")
    assert same_bits(everything(trainer), before)


def test_one_round_of_heldout_readings_leaves_the_learners_as_if_nothing_was_read() -> None:
    class Blind(MetaGradient):
        needs_heldout = True

        def read(self, probe):
            return torch.zeros_like(probe.theta)

    model = partial(ConvNet, dropout=0.4)
    ends = []
    for metagrad in (Blind(), LastGradient(batch="heldout")):
        trainer = make("fomaml", image_tasks(), model, metagrad=metagrad, meta_every=2, horizon=6, rounds=1)
        ends.append({name: t for name, t in everything(run(trainer)).items() if name != "phi"})
    assert same_bits(*ends)
    assert ends[0]["images0/buffer/body.1.num_batches_tracked"] == 6


def test_heldout_examples_are_never_trained_on() -> None:
    trainer = run(make("fomaml", image_tasks(), batch="heldout", heldout=0.25), 1)
    for learner in trainer.learners:
        trained = {int(i) for step in range(20) for i in learner.batches.indices(step)}
        held = {int(i) for step in range(20) for i in learner.batches.indices(step, "heldout")}
        assert held
        assert not trained & held
        assert len(trained | held) == len(learner.task.train[1])


# -- round boundaries ------------------------------------------------------------------------------------------


def test_a_reset_renews_theta_and_only_what_it_is_told_to() -> None:
    def boundary(renew: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        trainer = run(make("reptile", image_tasks(), horizon=3, renew=renew), 3)
        before = everything(trainer)
        trainer.meta_step.begin_round()
        assert torch.equal(trainer.theta, trainer.phi.expand_as(trainer.theta))
        return before, everything(trainer)

    groups = {"heads": "/own/", "statistics": "/buffer/", "optimizer": "/optimizer/"}
    for renewed in ((), ("heads",), ("statistics",), ("optimizer",), ("heads", "optimizer", "statistics")):
        before, after = boundary(renewed)
        for group, part in groups.items():
            names = [name for name in before if part in name]
            assert names
            kept = [name in after and torch.equal(before[name], after[name]) for name in names]
            assert any(kept) is (group not in renewed), (renewed, group)
            assert all(kept) is (group not in renewed), (renewed, group)
        if "statistics" in renewed:
            assert not after["images0/buffer/body.1.running_mean"].any()
            assert after["images0/buffer/body.1.num_batches_tracked"] == 0


def test_renewed_heads_differ_from_round_to_round_and_repeat_with_the_seed() -> None:
    def heads() -> list[Tensor]:
        trainer, seen = make("reptile", image_tasks(), horizon=2, rounds=3, renew=("heads",)), []
        for _ in range(3):
            trainer.meta_step.begin_round()
            seen.append(trainer.learners[0].own["fc.weight"].detach().clone())
            run(trainer, 2)
        return seen

    first, second = heads(), heads()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


def test_tasks_join_and_leave_at_a_round_boundary() -> None:
    tasks = image_tasks((2, 3, 5))
    trainer = run(make("trajectory-shifting", tasks[:2], horizon=3, rounds=4), 3)
    before = everything(trainer)
    trainer.set_tasks(tasks[1:])
    trainer.meta_step.begin_round()
    assert trainer.meta_step.active.names == ("images1", "images2")
    after = everything(trainer)
    stay = [name for name in before if name.startswith("images1/")]
    assert stay
    assert all(torch.equal(before[name], after[name]) for name in stay)
    assert torch.equal(trainer.theta, trainer.phi.expand_as(trainer.theta))
    fresh = make("trajectory-shifting", tasks, horizon=3)
    fresh.meta_step.begin_round()
    assert torch.equal(named_head(trainer, 1), named_head(fresh, 2))  # the head that it always would have had
    run(trainer, 4)
    with pytest.raises(UsageError, match="at a round boundary"):
        trainer.set_tasks(tasks)
    run(trainer)
    assert trainer.phi.isfinite().all()


def named_head(trainer, row: int) -> Tensor:
    return trainer.learners[row].own["fc.weight"]


def test_a_task_that_stays_may_bring_other_data_and_another_weight() -> None:
    trainer = run(make("trajectory-shifting", image_tasks(), horizon=2, rounds=4), 2)
    head = named_head(trainer, 0).clone()
    changed = image_tasks()
    changed[0] = Task(name="images0", train=image_data(30, 2, seed=9), outputs=2, weight=3.0)
    trainer.set_tasks(changed)
    trainer.meta_step.begin_round()
    assert trainer.learners[0].batches.size == 30
    assert torch.equal(named_head(trainer, 0), head)
    torch.testing.assert_close(trainer.meta_step.active.weights, torch.tensor([0.6, 0.2, 0.2], dtype=DOUBLE))


def test_tasks_that_cannot_join_are_refused() -> None:
    class Narrow(ConvNet):
        def __init__(self, task: Task) -> None:
            super().__init__(task, width=4 if task.outputs != 7 else 3)

    tasks = image_tasks((2, 3))
    trainer = run(make("reptile", tasks, Narrow, horizon=2), 2)
    with pytest.raises(UsageError, match=r"task 'images0' cannot join: shared parameter 'body\.0\.weight'"):
        trainer.set_tasks(image_tasks((7,)))
    alone = run(make("single-task", tasks, horizon=2), 2)
    with pytest.raises(UsageError, match="trains on one task, 2 were given"):
        alone.set_tasks(tasks)
    few = run(make("reptile", image_tasks((2, 3, 5)), horizon=2, tasks_per_round=2), 2)
    with pytest.raises(UsageError, match="tasks_per_round is 2"):
        few.set_tasks(tasks[:1])
    with pytest.raises(UsageError, match="'images1' came back with 4 outputs and has a head for 3"):
        trainer.set_tasks(image_tasks((2, 4)))


def test_waiting_tasks_keep_head_and_statistics() -> None:
    trainer = make("reptile", image_tasks((2, 3, 5)), tasks_per_round=1, horizon=2, rounds=12)
    last: dict[str, Tensor] = {}
    returned = 0
    while trainer.step < trainer.total_steps:
        run(trainer, 1)
        (name,) = trainer.meta_step.active.names
        learner = trainer.learners[0]
        if trainer.k == 1 and name in last:
            returned += 1
            assert learner.module.body[1].num_batches_tracked == last[name] + 1
        last[name] = learner.module.body[1].num_batches_tracked.clone()
    assert returned > 3


def test_the_culprit_of_a_bad_loss_is_named_even_after_its_round() -> None:
    tasks = image_tasks((2, 3, 5))
    tasks[1].loss = lambda module, batch: module(batch[0]).sum() * torch.inf
    for options in ({}, {"tasks_per_round": 1}):
        trainer = make("reptile", tasks, horizon=2, rounds=10, seed=1, **options)
        first = next(event.step for event in trainer if "images1" in event.tasks)
        run(trainer)
        with pytest.raises(NonFiniteLoss, match=f"'images1' is not finite at inner step {first} "):
            trainer.check_finite()


def test_no_head_at_all() -> None:
    trainer = run(make("trajectory-shifting", image_tasks((3, 3)), head=()))
    assert "fc.weight" in trainer.initialization
    assert not trainer.learners[0].own
    assert named_theta(trainer, "images0").keys() == trainer.initialization.keys()


# -- memory ----------------------------------------------------------------------------------------------------

_PEAK = """
import resource, sys, torch
from torch import nn
from trajshift import Inner, MetaTrainer, Task

class Net(nn.Module):
    def __init__(self, task):
        super().__init__()
        self.body = nn.Parameter(torch.zeros(150_000))
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x + self.body[:4])

data = (torch.randn(32, 4), torch.arange(32) % 2)
count = int(sys.argv[1])
tasks = [Task(name=f"t{i}", train=data, outputs=2) for i in range(count)]
trainer = MetaTrainer(Net, tasks, "trajectory-shifting", horizon=1, rounds=60, batch_size=4,
                      tasks_per_round=8, inner=Inner(options={"momentum": 0.9}))
seen = set()
for event in trainer:
    seen |= set(event.tasks)
assert len(seen) > 0.6 * count
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_four_hundred_tasks_take_the_memory_of_eight() -> None:
    peaks = [
        int(subprocess.run([sys.executable, "-c", _PEAK, str(n)], capture_output=True, text=True, check=True).stdout)
        for n in (8, 400)
    ]
    assert peaks[1] < 1.1 * peaks[0]
