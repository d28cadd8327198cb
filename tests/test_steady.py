"""Steps that are like the last one are recorded in less time: what is recorded is what it would be otherwise, whatever happens between."""

from contextlib import suppress
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import nn, optim

import explaind
from explaind.errors import RecordError
from explaind.record.steady import Steady
from explaind.record.watched import Watched
from explaind.store.row import EARLY, LATE, SMALL, StepRow
from explaind.store.tail import records

STEPS = 20
X, Y = torch.randn(30, 4, generator=torch.Generator().manual_seed(1)), torch.arange(30) % 3


class Net(nn.Sequential):
    """A small classifier with dropout, which is off unless a test turns it on."""

    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.GELU(), nn.Dropout(0.5), nn.Linear(5, 3))
        self[2].eval()


class Interruption(Exception):
    pass


def adamw(model):
    return optim.AdamW(model.parameters(), lr=0.05)


def no_steady(monkeypatch):
    monkeypatch.setattr(Watched, "steady", False)


def train(path, made=adamw, act=None, hook=None, ids=None, weights=None):
    """Files of a run and its last parameters; act: (step, model, optimizer) before a step; hook: behind the optimizer's own."""
    torch.manual_seed(0)
    model = Net()
    optimizer, done = made(model), [0]
    if hook is not None:
        optimizer.register_step_post_hook(lambda *args: hook(done[0], model, optimizer))
    with explaind.record(optimizer, model, path, data=[*zip(X, Y, strict=True)]) as recorder:
        for step in range(STEPS):
            done[0] = step
            batch = torch.arange(step, step + 6) % 30 if ids is None else ids(step)
            recorder.examples(batch, None if weights is None else weights(step))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[batch]), Y[batch]).backward()
            if act is not None:
                act(step, model, optimizer)
            with suppress(Interruption):
                optimizer.step()
        logged = records(path)
    run = explaind.open(path)
    assert (run.steps, run.damage()) == (STEPS, [])
    chunks = {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file() and f.parent != path}
    return chunks, logged, [p.detach().clone() for p in model.parameters()], optimizer


def counted(monkeypatch):
    """How many steps begin, and are made, like the last one."""
    count = {"begin": 0, "made": 0}

    def counting(name, own):
        def counted(self, *args):
            found = own(self, *args)
            count[name] += found is not None
            return found

        return counted

    for name in count:
        monkeypatch.setattr(Steady, name, counting(name, getattr(Steady, name)))
    return count


def steps(path, model, optimizer, number=STEPS, act=lambda step: None, x=X[:6], **how):
    """A run of steps on one batch; act: before each."""
    with explaind.record(optimizer, model, path, **how) as recorder:
        for step in range(number):
            act(step)
            recorder.examples(range(len(x)))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    return explaind.open(path)


def both(tmp_path, monkeypatch, **how):
    """Holds a training that is recorded with and without short cuts against each other; how many of its steps took one, to their end."""
    count = counted(monkeypatch)
    quick, quick_log, quick_theta, _ = train(tmp_path / "quick", **how)
    no_steady(monkeypatch)
    slow, slow_log, slow_theta, _ = train(tmp_path / "slow", **how)
    assert quick.keys() == slow.keys()
    assert [name for name in slow if quick[name] != slow[name]] == []
    assert all(torch.equal(a, b) for a, b in zip(quick_theta, slow_theta, strict=True))
    assert len(quick_log) == len(slow_log) > 0
    for a, b in zip(quick_log, slow_log, strict=True):
        assert (a.step, a.links.before, a.links.behind, a.row.mode) == (b.step, b.links.before, b.links.behind, b.row.mode)
        for name in ("batch", "part", "weight", "hyper", "age", "preconditioner"):
            assert np.array_equal(getattr(a.row, name), getattr(b.row, name)), name
        assert np.array_equal(a.theta, b.theta)
    return count


FIRST = -(-STEPS // 16)
"""Steps that begin a block: their momentum is recorded."""
ALL = STEPS - FIRST - 1
"""Steps that can be like others: the first block begins with none that is, so that its second is looked at from all sides too."""


@pytest.mark.parametrize(
    ("made", "quick"),
    [
        (adamw, ALL),
        (lambda m: optim.Adam(m.parameters(), amsgrad=True), ALL),
        (lambda m: optim.AdamW(m.parameters(), fused=True), ALL),
        (lambda m: optim.AdamW(m.parameters(), foreach=False), ALL),
        (lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9), ALL),
        (lambda m: optim.SGD(m.parameters(), lr=0.1), ALL),
        (lambda m: optim.AdamW([{"params": m[0].parameters(), "lr": 0.1}, {"params": m[3].parameters()}]), ALL),
        (lambda m: optim.Adamax(m.parameters()), ALL),
        (lambda m: optim.Adagrad(m.parameters(), lr=0.1), ALL + 1),  # it has no momentum
        (lambda m: optim.RMSprop(m.parameters(), lr=0.01, momentum=0.5), ALL),
        (lambda m: optim.RMSprop(m.parameters(), lr=0.01, centered=True), 0),  # its tensor is made anew at every step
        (lambda m: optim.NAdam(m.parameters()), 0),  # its numbers change from step to step
        (lambda m: optim.Adadelta(m.parameters()), 0),
        (lambda m: optim.Rprop(m.parameters()), 0),
        (lambda m: optim.Adafactor(m.parameters()), 0),
        (lambda m: optim.AdamW(m.parameters(), lr=torch.tensor(0.01)), 0),  # a tensor may change in place
        (lambda m: optim.AdamW([m[0].weight, m[3].weight]), ALL),
    ],
)
def test_the_same_is_recorded(tmp_path, monkeypatch, made, quick):
    count = both(tmp_path, monkeypatch, made=made)
    assert count == {"begin": quick, "made": quick}


def change_lr(step, model, optimizer):
    optimizer.param_groups[0]["lr"] = 0.05 if step % 7 else 0.02


def clip(step, model, optimizer):
    if step % 5 == 2:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def reload(step, model, optimizer):
    if step % 9 == 4:
        optimizer.load_state_dict(optimizer.state_dict())


def forget(step, model, optimizer):
    if step % 9 == 4:
        optimizer.state.clear()


def forget_one(step, model, optimizer):
    if step % 9 == 4:
        optimizer.state[model[0].weight] = {}


def swap_states(step, model, optimizer):
    """Of two tensors of the same shape: the keys are the same, and so are the values."""
    if step % 9 == 4:
        one, other = model[0].bias, model[3].weight
        states = dict(optimizer.state)
        states[one], states[other] = ({k: v.clone() for k, v in states[p].items()} for p in (one, other))
        optimizer.state.clear()
        optimizer.state.update({p: states[p] for p in reversed(states)})


def train_mode(step, model, optimizer):
    model.train(step % 8 == 3)  # with dropout in the next pass


def eval_all(step, model, optimizer):
    model[0].training = step % 8 != 3


def without(step, model, optimizer):
    if step % 6 == 3:
        model[0].bias.grad = None


def move(step, model, optimizer):
    if step % 6 == 3:
        model[0].weight.data = model[0].weight.data.clone()


def interrupt(step, model, optimizer):
    if step % 6 == 3:
        handle = optimizer.register_step_pre_hook(raising)
        with suppress(Interruption):
            optimizer.step()
        handle.remove()


def raising(*args):
    raise Interruption


def closure(step, model, optimizer):
    if step % 6 == 3:
        own = optimizer.step
        optimizer.step = lambda: (vars(optimizer).pop("step"), own(lambda: torch.zeros(())))[1]


@pytest.mark.parametrize("act", [change_lr, clip, forget, forget_one, swap_states, train_mode, eval_all, without, closure])
def test_a_step_that_is_not_like_the_last_is_seen(tmp_path, monkeypatch, act):
    count = both(tmp_path, monkeypatch, act=act)
    assert 0 < count["made"] < ALL, "and those after it are quick again"


@pytest.mark.parametrize("act", [reload, move, interrupt])
def test_what_does_not_change_a_step(tmp_path, monkeypatch, act):
    assert both(tmp_path, monkeypatch, act=act)["made"] == ALL


def test_a_fused_optimizer_that_skips_steps(tmp_path, monkeypatch):
    def run(path):
        torch.manual_seed(0)
        model = Net()
        optimizer = optim.AdamW(model.parameters(), fused=True)
        with explaind.record(optimizer, model, path) as recorder:
            for step in range(STEPS):
                recorder.examples([0, 1])
                optimizer.zero_grad()
                model(X[:2]).sum().backward()
                optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.tensor(float(step % 6 == 3))
                optimizer.step()
                del optimizer.grad_scale, optimizer.found_inf
        return explaind.open(path)

    quick = run(tmp_path / "quick")
    no_steady(monkeypatch)
    slow = run(tmp_path / "slow")
    assert quick.steps == slow.steps == sum(step % 6 != 3 for step in range(STEPS))
    assert np.array_equal(quick.states(0, quick.steps + 1), slow.states(0, slow.steps + 1))
    assert np.array_equal(quick.step_checksums(0, quick.steps), slow.step_checksums(0, slow.steps))


def moved_state(step, model, optimizer):
    if step % 6 == 3:
        state = optimizer.state[model[0].weight]
        state["exp_avg_sq"] = state["exp_avg_sq"].clone()


def other_lr(step, model, optimizer):
    optimizer.param_groups[0]["lr"] = 0.05 if step % 6 else 0.02


def other_mode(step, model, optimizer):
    model[1].training = step % 6 != 3


def lost_gradient(step, model, optimizer):
    if step % 6 == 3:
        model[3].bias.grad = None


@pytest.mark.parametrize("hook", [moved_state, other_lr, other_mode, lost_gradient])
def test_what_changes_while_the_optimizer_steps_is_seen(tmp_path, monkeypatch, hook):
    count = both(tmp_path, monkeypatch, hook=hook)
    assert 0 < count["made"] < count["begin"]


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), lambda m: m.to(memory_format=torch.channels_last)])
def test_what_is_copied_to_be_recorded_is_copied_once(tmp_path, monkeypatch, change):
    """Vectors that do not stand as they are recorded: a row cannot be made of the one before, and nobody tries."""
    count = counted(monkeypatch)
    model = change(nn.Sequential(nn.Conv2d(3, 3, 2), nn.Flatten()))
    x = torch.randn(1, 3, 3, 3).to(next(model.parameters()).dtype)
    optimizer = optim.AdamW(model.parameters())
    run = steps(tmp_path / "run", model, optimizer, 5, x=x)
    assert count == {"begin": 0, "made": 0}
    assert np.array_equal(run.states(5, 6)[0], torch.cat([p.detach().reshape(-1).float() for p in model.parameters()]).numpy())


def test_batches_of_two_sizes(tmp_path, monkeypatch):
    count = both(tmp_path, monkeypatch, ids=lambda step: torch.arange(3 if step % 5 == 4 else 6))
    assert 0 < count["made"] < STEPS


def test_weights_of_ones_own(tmp_path, monkeypatch):
    both(tmp_path, monkeypatch, weights=lambda step: torch.rand(6, generator=torch.Generator().manual_seed(step)))


def test_parameters_that_are_turned_round_where_they_stand(tmp_path, monkeypatch):
    """The numbers in memory stay, and their order in the tensor does not: no checksum of memory tells."""

    def run(path):
        torch.manual_seed(0)
        model = nn.Linear(4, 4, bias=False)

        def turn(step):
            if step == 4:
                model.weight.data = model.weight.data.t()

        return steps(path, model, optim.SGD(model.parameters(), lr=0.1), 6, turn), model

    quick, model = run(tmp_path / "quick")
    assert np.array_equal(quick.states(6, 7)[0], model.weight.detach().reshape(-1).numpy())
    no_steady(monkeypatch)
    assert np.array_equal(quick.states(0, 7), run(tmp_path / "slow")[0].states(0, 7))


def test_micro_batches(tmp_path, monkeypatch):
    def run(path):
        torch.manual_seed(0)
        model = Net()
        optimizer = adamw(model)
        with explaind.record(optimizer, model, path) as recorder:
            for step in range(STEPS):
                optimizer.zero_grad()
                for part in torch.arange(6).split(3 if step % 5 == 4 else 6):
                    recorder.examples(part)
                    nn.functional.cross_entropy(model(X[part]), Y[part]).backward()
                if step % 7 == 3:
                    optimizer.zero_grad()  # and all over again
                    recorder.examples([7, 8, 9, 10, 11, 12])
                    nn.functional.cross_entropy(model(X[7:13]), Y[7:13]).backward()
                optimizer.step()
        return explaind.open(path)

    count = counted(monkeypatch)
    quick = run(tmp_path / "quick")
    assert count["made"] > 5
    no_steady(monkeypatch)
    slow = run(tmp_path / "slow")
    assert np.array_equal(quick.step_checksums(0, STEPS), slow.step_checksums(0, STEPS))
    for a, b in zip(quick.block(0, STEPS).rows, slow.block(0, STEPS).rows, strict=True):
        assert np.array_equal(a.batch, b.batch)
        assert np.array_equal(a.part, b.part)


def test_parameters_that_no_optimizer_holds_are_not_stepped(tmp_path):
    model = Net()
    optimizer = optim.SGD(model[0].parameters(), lr=0.1)
    run = steps(tmp_path / "run", model, optimizer, watch=["3.*"])
    assert [row.age.tolist()[2:] for row in run.block(0, STEPS).rows] == [[-1, -1]] * STEPS


def test_autocast_from_some_step_on(tmp_path):
    model = Net()
    with explaind.record(optimizer := adamw(model), model, tmp_path / "run") as recorder:
        for step in range(STEPS):
            recorder.examples(range(6))
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=step % 9 > 4):
                loss = nn.functional.cross_entropy(model(X[:6]), Y[:6])
            loss.backward()
            optimizer.step()
    found = [row.precision for row in explaind.open(tmp_path / "run").block(0, STEPS).rows]
    assert found == [torch.finfo(torch.bfloat16).eps if step % 9 > 4 else 0.0 for step in range(STEPS)]


def nine(path, harm=None, factor=1.0, told=True):
    """Steps, of which the last is not like the others."""
    model = Net()
    model.register_buffer("still", torch.zeros(2))
    optimizer = adamw(model)
    with explaind.record(optimizer, model, path) as recorder:
        for last in [False] * 8 + [True]:
            if told or not last:
                recorder.examples(range(6))
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(X[:6]), Y[:6]) * (factor if last else 1.0)).backward()
            if last and harm is not None:
                harm(model, optimizer)
            optimizer.step()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda m, o: m[0].weight.grad.mul_(float("nan")), "a gradient is not finite"),
        (lambda m, o: m[3].weight.grad.fill_(float("inf")), "a gradient is not finite"),
        (lambda m, o: m[0].weight.data.add_(1e-6), "changed between two steps"),
        (lambda m, o: m.still.add_(1), "buffer or frozen parameter moved"),
        (lambda m, o: o.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}), "was given a parameter that is not recorded"),
    ],
)
def test_what_is_refused_stays_refused(tmp_path, harm, said):
    with pytest.raises(RecordError, match=said):
        nine(tmp_path / "run", harm=harm)
    assert explaind.open(tmp_path / "run").steps == 8


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    """Nobody touched its gradients, so that the step is like the last one until they are looked at."""
    with pytest.raises(RecordError, match="not finite"):
        nine(tmp_path / "run", factor=float("nan"))
    assert explaind.open(tmp_path / "run").steps == 8


def test_a_step_of_which_nobody_said_whose_it_is(tmp_path):
    with pytest.raises(RecordError, match="nobody said on whose gradient"):
        nine(tmp_path / "run", told=False)


def test_a_row_like_another_is_the_row_of_its_own_fields():
    rng = np.random.default_rng(0)
    fields = {"part": np.zeros(5, np.int32), "weight": np.full(5, 0.2), "hyper": rng.random((3, 2)), "mode": (True, False)}
    first = StepRow(np.arange(5), age=np.arange(3, dtype=np.int32), preconditioner=rng.random(7), anchor=None, **fields)
    small = first.small
    _ = first.alike, first.views
    first.forget()
    assert "small" not in vars(first)
    batch, age = np.arange(5, 10), np.arange(1, 4, dtype=np.int32)
    found, wanted = first.again(batch, age), StepRow(batch, age=age, preconditioner=first.preconditioner, anchor=None, **fields)
    assert (found.small, found.alike, found.held) == (wanted.small, wanted.alike, wanted.held)
    assert first.small == small != found.small, "the other stays as it is"
    for name in ("batch", "age", "part", "weight", "hyper", "preconditioner"):
        assert getattr(found, name) is getattr(wanted, name)


def test_no_field_of_a_row_is_left_out_of_the_log():
    known = (*SMALL, *EARLY, *LATE, "mode", "gap", "precision", "gradients")  # the last stand in chunks of their own
    assert sorted(field.name for field in fields(StepRow)) == sorted(known)
