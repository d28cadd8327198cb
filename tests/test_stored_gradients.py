"""Gradients of single examples that the training itself has stored: they are those that are computed afterwards, and so is the ledger."""

import copy
import json
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import xarray
import zarr
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import explaind
from explaind.cli import main
from explaind.errors import RecordError, RequestError, StoreError
from explaind.ledger.verify_run import RunVerdict, verify_run
from explaind.record import recomputing
from explaind.store.exporting import export_run, import_run
from explaind.store.repair import repair
from tests import cases
from tests.closeness import algebra, rounding, same
from tests.test_resumed_recording import Loop

ALL = ("query", "output", "example", "layer", "step")
ADAMW = cases.optimizer_named("adamw")


def stored(path, problem=cases.PLAIN, case=ADAMW, **options):
    return cases.recorded(path, problem, case, gradients="store", **options)


def from_store(run, problem=cases.PLAIN, **options):
    """A ledger without data and losses."""
    return cases.decomposed(run, problem, data=None, losses=None, **options)


def alike(got, want, how=algebra):
    scale = max(float(abs(want["data"]).max()), float(abs(want["initial"]).max()))
    for row in want.rows:
        how(got[row], want[row], row, scale)


PROBLEMS = [problem for problem in cases.PROBLEMS if problem.name not in ("sum loss", "frozen parameter", "clipped in micro-batches")]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_ledger_from_the_store_is_the_one_that_is_recomputed(problem, tmp_path):
    run = stored(tmp_path / "run", problem)
    got, want = from_store(run, problem, rule="gauss:1"), cases.decomposed(run, problem, products="materialise", rule="gauss:1")
    alike(got, want)
    assert got.checks.replay_error.max() <= 1e-6
    assert run.damage() == []


def clipped_in_both_ways(model):
    nn.utils.clip_grad_value_(model[0].parameters(), 0.05)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    model[2].bias.grad.zero_()


def scaled_up(model):
    model[0].weight.grad.mul_(1.5)


def test_gradients_that_were_clipped_in_both_ways(tmp_path):
    problem = cases.Problem("clipped in both ways", touch=clipped_in_both_ways)
    run = stored(tmp_path / "run", problem)
    alike(from_store(run, problem, rule="gauss:1"), cases.decomposed(run, problem, products="materialise", rule="gauss:1"))
    with pytest.raises(RecordError, match="do not sum to the gradient"):
        stored(tmp_path / "other", cases.Problem("scaled up", touch=scaled_up))


@pytest.mark.parametrize("problem", [problem for problem in cases.WHOLE if problem.name not in ("dropout", "batch norm")], ids=str)
def test_examples_that_only_their_batch_has_a_gradient_of(problem, tmp_path):
    options = {} if problem.network is cases.dropping else {"losses": cases.losses, "data": cases.DATA}
    run = stored(tmp_path / "run", problem, **options)
    alike(from_store(run, problem, rule="gauss:1"), cases.decomposed(run, problem, rule="gauss:1"))


class Sequence(nn.Module):
    """Tokens and their positions, a projection that is used twice and tied to the table, normalisations."""

    def __init__(self):
        super().__init__()
        self.table, self.place = nn.Embedding(7, 4, padding_idx=0), nn.Embedding(5, 4)
        self.before, self.after = nn.LayerNorm(4), nn.RMSNorm(4)
        self.twice, self.out = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        h = self.table(x) + self.place(torch.arange(x.shape[1]).expand_as(x))
        h = self.twice(torch.tanh(self.twice(self.before(h))))
        return self.out(self.after(h)).mean(1)


class Positions(nn.Module):
    """As many positions as there are examples, looked up once for all of them."""

    def __init__(self):
        super().__init__()
        self.place, self.out = nn.Embedding(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(x[:, :, None] * self.place(torch.arange(x.shape[1]))).mean(1)


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.out = nn.Linear(1, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.inside(x.T[..., None])).mean(0))


class Called(nn.Module):
    """A recurrent or attending layer over a sequence of vectors."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.out = layer, nn.Linear(4, 2)

    def forward(self, x):
        h = x.unflatten(1, (-1, 4))
        h = self.layer(h, h, h)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(h)
        return self.out((h[0] if isinstance(h, tuple) else h).mean(1))


def folded(*layers, shape):
    return nn.Sequential(nn.Unflatten(1, shape), *layers, nn.Flatten(), nn.LazyLinear(2))


def convolutions():
    first = nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2)
    return folded(first, nn.ReLU(inplace=True), nn.GroupNorm(2, 4), nn.Conv1d(4, 2, 2, dilation=2, padding="same"), shape=(2, 6))


FLOATS = {
    "conv1d": convolutions,
    "conv2d": lambda: folded(
        nn.Conv2d(1, 3, 2, padding=(1, 0), padding_mode="circular"), nn.Tanh(), nn.Conv2d(3, 2, (1, 2), bias=False), shape=(1, 3, 4)
    ),
    "conv3d": lambda: folded(nn.Conv3d(1, 2, 2, padding="valid"), nn.GELU(), shape=(1, 2, 2, 3)),
    "positions": lambda: nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Linear(4, 3), nn.LayerNorm((3, 3)), nn.Flatten(), nn.Linear(9, 2)),
    "time first": TimeFirst,
    "lstm": lambda: Called(nn.LSTM(4, 4, batch_first=True)),
    "attention": lambda: Called(nn.MultiheadAttention(4, 2, batch_first=True)),
    "encoder": lambda: Called(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)),
    "batch norm": lambda: nn.Sequential(nn.Linear(12, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)),
    "bare": lambda: nn.Sequential(nn.Linear(12, 3), nn.PReLU(3), nn.Linear(3, 2)),
}
SEEN = ("conv1d", "conv2d", "conv3d", "positions", "sequence")
"""Models of which hooks see all."""


def problem_of(name, rows=6, columns=12):
    """A model, its data and what each example should learn."""
    torch.manual_seed(0)
    if name == "sequence":
        x, y, model = torch.randint(0, 7, (rows, 5)), torch.randint(0, 7, (rows,)), Sequence()
    else:
        x, y, model = torch.randn(rows, columns, dtype=torch.float64), torch.randint(0, 2, (rows,)), FLOATS[name]()
        model.double()(x)
    return model.double(), TensorDataset(x, y)


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def one_by_one(model, data, losses=losses):
    """The gradient of every example, within the batch of all, the slow way: [example, param]."""
    params = list(model.parameters())
    torch.manual_seed(1)
    values = losses(model, data[:])
    found = [torch.autograd.grad(v, params, retain_graph=True, allow_unused=True) for v in values]
    return torch.stack(
        [
            torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(params, one, strict=True)])
            for one in found
        ]
    )


def step(model, train_set, path, loss=losses, reduce=torch.mean, around=nullcontext, after=lambda model: None, **options):
    """One recorded step on all the data; the run."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    with explaind.record(optimizer, model, path, gradients="store", **options) as recorder:
        recorder.examples(torch.arange(len(train_set)))
        with around():
            reduce(loss(model, train_set[:])).backward()
        after(model)
        optimizer.step()
    return explaind.open(path)


@pytest.mark.parametrize("name", [*FLOATS, "sequence"])
def test_they_are_the_gradients_of_single_examples(name, tmp_path, monkeypatch):
    model, data = problem_of(name, rows=20)
    want = one_by_one(copy.deepcopy(model), data)
    if name in SEEN:  # the slow route must not be taken
        monkeypatch.setattr(recomputing.Recomputed, "_add", lambda *a: pytest.fail("computed once more"))
    given = {} if name in SEEN else {"losses": losses, "data": data}
    run = step(model, data, tmp_path / "run", **given)
    found = run.gradients(0, 0, len(data))
    algebra(found[:, : want.shape[1]], want.numpy())
    assert not found[:, want.shape[1] :].any()  # of buffers
    if name in SEEN:
        monkeypatch.undo()
        again = step(problem_of(name, rows=20)[0], data, tmp_path / "again", losses=losses, data=data)
        same(again.gradients(0, 0, len(data)), run.gradients(0, 0, len(data)))


def both(model, run, data, **options):
    """The ledger from the store, and the one that is recomputed."""
    queries, measure = data[:3], lambda m, b: m(b[0])
    asked = {"queries": queries, "measure": measure, "rule": "gauss:2", "keep": ("query", "example", "layer"), **options}
    return explaind.decompose(run, model, **asked), explaind.decompose(
        run, model, data=data, losses=losses, products="materialise", **asked
    )


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


DATA = TensorDataset(torch.randn(16, 12, generator=torch.Generator().manual_seed(2)), torch.arange(16) % 2)


def trained(model, path, steps=6, batch=8, loss=lambda s: losses, **options):
    """A few steps of a plain loop with batches of two sizes; the optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    recording = explaind.record(optimizer, model, path, **options) if path is not None else nullcontext()
    with recording as recorder:
        for s in range(steps):
            ids = torch.arange(3 * s, 3 * s + (batch if s % 2 else 3)) % len(DATA)
            if recorder is not None:
                recorder.examples(ids)
            optimizer.zero_grad()
            loss(s)(model, DATA[ids]).mean().backward()
            optimizer.step()
    return optimizer


def state(model, optimizer):
    """Everything that a training ends with, as bytes."""
    moments = [t for s in optimizer.state.values() for t in s.values()]
    return [t.detach().numpy().tobytes() for t in (*model.parameters(), *moments)] + [torch.get_rng_state().numpy().tobytes()]


def test_in_float32_the_two_ledgers_differ_by_rounding_and_the_training_is_not_disturbed(tmp_path):
    alone, watched = mlp(), mlp()
    plain, optimizer = trained(alone, None), trained(watched, tmp_path / "run", gradients="store")
    assert state(watched, optimizer) == state(alone, plain)
    run = explaind.open(tmp_path / "run")
    assert (run.manifest.gradients, run.gradients(1, 0, 8).dtype, run.steps) == ("float32", "float32", 6)
    got, want = both(mlp(), run, DATA)
    alike(got, want, rounding)
    assert got.verify().ok
    groups = {"example": {"some": range(0, 16, 3)}, "layer": {"first": ["0.*"]}}
    alike(*both(mlp(), run, DATA, groups=groups), rounding)
    alike(*both(mlp(), run, DATA, keep=("example", "param")), rounding)


@pytest.mark.parametrize(("dtype", "size"), [("float16", 2), (torch.float64, 8)])
def test_they_are_stored_in_any_dtype(dtype, size, tmp_path):
    trained(mlp(), tmp_path / "run", gradients="store", gradient_dtype=dtype)
    run = explaind.open(tmp_path / "run")
    assert run.gradients(0, 0, 3).dtype.itemsize == size
    got, want = both(mlp(), run, DATA)
    assert abs(got["data"] - want["data"]).max() <= (2e-3 if size == 2 else 1e-4) * abs(want["data"]).max()
    assert got.verify().ok


def refused(match, *args, **options):
    with pytest.raises(RecordError, match=match) as caught:
        step(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [("lstm", "layer.weight_ih_l0 of LSTM"), ("attention", "MultiheadAttention"), ("batch norm", "BatchNorm1d"), ("bare", "PReLU")],
)
def test_what_hooks_do_not_see_is_refused_by_name(name, words, tmp_path):
    model, data = problem_of(name)
    told = refused("cannot be seen by hooks", model, data, tmp_path / "run")
    assert words in told
    assert "losses=" in told
    refused("without the data", model, data, tmp_path / "run", losses=losses)


def test_rows_that_are_no_examples_are_refused_even_where_there_are_as_many(tmp_path):
    _, data = problem_of("time first", rows=4, columns=4)
    assert "place is called with 4 rows where there are 2 examples" in refused("not seen", Positions().double(), data, tmp_path / "a")
    assert "(Linear) was called with rows that are not the 6 examples" in refused("not seen", *problem_of("time first"), tmp_path / "b")
    model = Positions().double()
    want = one_by_one(copy.deepcopy(model), data)
    algebra(step(model, data, tmp_path / "c", losses=losses, data=data).gradients(0, 0, 4), want.numpy())


def contrastive(model, batch):
    """Each example should be like itself more than like the others."""
    h = model(batch[0])
    return F.cross_entropy(h @ h.T, torch.arange(len(h)), reduction="none")


def test_coupled_losses_go_the_way_of_the_whole_batch_or_are_found_by_verify(tmp_path):
    model, data = problem_of("positions", rows=20)
    want = one_by_one(copy.deepcopy(model), data, contrastive)
    run = step(copy.deepcopy(model), data, tmp_path / "given", contrastive, losses=contrastive, data=data)
    algebra(run.gradients(0, 0, 20), want.numpy())
    assert verify_run(run, model, data, contrastive).ok
    unknown = step(copy.deepcopy(model), data, tmp_path / "unknown", contrastive)
    (reason,) = verify_run(unknown, model, data, contrastive).reasons
    assert "stored gradients of examples of step 0 are not those of the losses" in reason


def test_a_sum_that_is_not_the_consumed_gradient_is_told_with_step_and_layer(tmp_path):
    def penalised(model, batch):
        return losses(model, batch) + model[2].weight.square().sum()

    assert "step 0: 2.weight" in refused("do not sum", mlp(), DATA, tmp_path / "penalty", penalised)
    assert "step 0: 0.weight" in refused("do not sum", mlp(), DATA, tmp_path / "noise", after=lambda m: m[0].weight.grad.add_(0.1))
    assert "step 0: 2.bias" in refused("do not sum", mlp(), DATA, tmp_path / "double", after=lambda m: m[2].bias.grad.mul_(2))
    with pytest.raises(RecordError, match="step 2"):
        trained(mlp(), tmp_path / "later", loss=lambda s: losses if s < 2 else penalised, gradients="store")
    run = explaind.open(tmp_path / "later")
    assert (run.steps, run.damage()) == (2, [])
    alike(*both(mlp(), run, DATA), rounding)


def test_examples_must_be_announced_before_their_forward_pass(tmp_path):
    optimizer = torch.optim.SGD((model := mlp()).parameters(), lr=0.1)

    def stepped(path, *order):
        with explaind.record(optimizer, model, path, gradients="store") as recorder:
            for what in order:
                recorder.examples(torch.arange(8)) if what == "announce" else losses(model, DATA[:8]).mean().div(2).backward()
            optimizer.step()

    def late(path):
        with explaind.record(optimizer, model, path, gradients="store") as recorder:
            loss = losses(model, DATA[:8]).mean()
            recorder.examples(torch.arange(8))
            loss.backward()
            optimizer.step()

    with pytest.raises(RecordError, match="a forward pass was made before its examples were announced"):
        late(tmp_path / "late")
    optimizer.zero_grad()
    with pytest.raises(RecordError, match="no backward pass of a micro-batch"):
        stepped(tmp_path / "second", "announce", "pass", "pass", "announce")
    optimizer.zero_grad()
    stepped(tmp_path / "fine", "announce", "pass", "announce", "pass")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_behind_a_gradient_scaler_the_ledger_is_the_recomputed_one(clip, fused, tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    with explaind.record(optimizer, model, tmp_path / "run", gradients="store") as recorder:
        for s in range(5):
            recorder.examples(torch.arange(8))
            optimizer.zero_grad()
            scaler.scale(losses(model, DATA[:8]).mean() * (torch.inf if s == 3 and not fused else 1.0)).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
    run = explaind.open(tmp_path / "run")
    got, want = both(mlp(), run, DATA)
    alike(got, want, rounding)
    assert (run.steps, got.verify().ok) == (4 + fused, True)
    rounding(run.gradients(0, 0, 8), one_by_one(mlp(), DATA)[:8].numpy())  # what was scaled is not in the store


def at(run, step):
    """The network as the training had it before a step."""
    model = mlp()
    model.load_state_dict({name: torch.as_tensor(value) for name, value in run.theta(step).items()})
    return model


@pytest.mark.parametrize("lost", [None, 0, 1])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("fused", [False, True])
def test_behind_one_gradient_scaler_for_two_optimizers(fused, clip, lost, tmp_path):
    """It unscales, and may skip, one after the other: each one's gradients are held against their sum when it consumes them."""
    model = mlp()
    pairs = [torch.optim.SGD(model[i].parameters(), lr=0.1, momentum=0.9, fused=fused) for i in (0, 2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
    with explaind.record(pairs, model, tmp_path / "run", gradients="store") as recorder:
        for step in range(4):
            recorder.examples(torch.arange(8))
            model.zero_grad()
            overflows = step == 1 and lost is not None
            hook = model[2 * (lost or 0)].weight.register_hook(lambda grad, factor=torch.inf if overflows else 1.0: grad * factor)
            scaler.scale(losses(model, DATA[:8]).mean()).backward()
            hook.remove()
            for optimizer in pairs:
                if clip:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
                scaler.step(optimizer)
            scaler.update()
    run = explaind.open(tmp_path / "run")
    got, want = both(mlp(), run, DATA)
    alike(got, want, rounding)
    assert (run.steps, run.damage(), got.verify().ok) == (4, [], True)
    for step in range(4):
        stored, kept = run.gradients(step, 0, 8), run.block(0, 4).rows[step].age >= 0
        wanted = one_by_one(at(run, step), DATA)[:8].numpy()
        for layer, stepped in zip(run.manifest.layers, kept, strict=True):
            own = slice(layer.offset, layer.offset + layer.size)
            rounding(stored[:, own], wanted[:, own] * stepped)


def test_an_optimizer_whose_examples_overflow_is_skipped_alone(tmp_path):
    """Their gradients are infinite themselves; the other optimizer's are held against their sum all the same."""
    model = mlp()
    pairs = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with explaind.record(pairs, model, tmp_path / "run", gradients="store", losses=losses, data=DATA) as recorder:
        for step in range(3):
            recorder.examples(torch.arange(8))
            model.zero_grad()
            out = model[1](model[0](DATA[:8][0]))
            out.register_hook(lambda delta, factor=torch.inf if step == 1 else 1.0: delta * factor)
            scaler.scale(F.cross_entropy(model[2](out), DATA[:8][1])).backward()
            for optimizer in pairs:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_value_(optimizer.param_groups[0]["params"], 0.01)
                scaler.step(optimizer)
            scaler.update()
    run = explaind.open(tmp_path / "run")
    assert [(row.age >= 0).tolist() for row in run.block(0, 3).rows] == [[True] * 4, [False, False, True, True], [True] * 4]
    got, want = both(mlp(), run, DATA)
    alike(got, want, rounding)
    assert got.verify().ok
    for step in range(3):
        wanted = one_by_one(at(run, step), DATA)[:8].numpy()
        wanted[:, : model[0].weight.numel() + model[0].bias.numel()] *= step != 1
        rounding(run.gradients(step, 0, 8), wanted)


@pytest.mark.parametrize("wrong", [0, 1])
def test_of_two_optimizers_either_ones_sum_is_checked(wrong, tmp_path):
    model = mlp()
    pairs = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]

    def training():
        with explaind.record(pairs, model, tmp_path / "run", gradients="store") as recorder:
            recorder.examples(torch.arange(8))
            losses(model, DATA[:8]).mean().backward()
            model[2 * wrong].weight.grad[0, 0] += 1.0
            for optimizer in pairs:
                optimizer.step()

    with pytest.raises(RecordError, match=rf"do not sum to the gradient .*step 0: {2 * wrong}\.weight"):
        training()


def test_closures_and_windows(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.record(optimizer, model, tmp_path / "run", gradients="store", steps=[(0, 2), (4, 6)]) as recorder:
        for _ in range(6):
            recorder.examples(torch.arange(8))

            def closure():
                optimizer.zero_grad()
                loss = losses(model, DATA[:8]).mean()
                loss.backward()
                return loss

            optimizer.step(closure)
    run = explaind.open(tmp_path / "run")
    assert (run.gaps.tolist(), run.damage()) == ([0, 0, 2, 0, 0], [])
    alike(*both(mlp(), run, DATA), rounding)


def test_losses_with_their_reduction_left_in_are_told(tmp_path):
    model = nn.Sequential(nn.Linear(12, 3), nn.PReLU(3), nn.Linear(3, 2))  # which hooks cannot see
    with pytest.raises(RecordError, match=r"losses must return one number an example.* a single number; .*reduction='none'"):
        step(model, DATA, tmp_path / "run", losses=lambda model, batch: losses(model, batch).mean(), data=DATA)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"thin": 2}, "in a thin run"),
        ({"gradient_filter": explaind.GrokfastEMA(0.9, 1.0)}, "in front of a gradient filter"),
        ({"gradient_dtype": torch.bfloat16}, "expected float16 or float32 or float64"),
        ({"gradients": True}, "unknown way"),
        ({"gradients": "store:many"}, "unknown way"),
        ({"gradients": "recompute", "gradient_dtype": "float16"}, "gradient_dtype is of gradients that are stored.*give gradients='store'"),
    ],
)
def test_arguments_that_do_not_go_together(options, match, tmp_path):
    model = mlp()
    with pytest.raises(RecordError, match=match):
        explaind.record(torch.optim.SGD(model.parameters(), lr=0.1), model, tmp_path / "run", **{"gradients": "store", **options})
    assert not (tmp_path / "run").exists()


def test_the_budget_is_held_before_a_batch_is_computed(tmp_path):
    one = 122 * 4
    with pytest.raises(RecordError, match="budget") as caught:
        trained(mlp(), tmp_path / "all", gradients="store:100", gradient_budget=200 * one)
    told = str(caught.value)
    assert all(
        word in told for word in ("100 steps × 3 examples × 122 parameters × 4 bytes (float32)", "gradient_dtype", "steps=", "thin=")
    )
    assert explaind.open(tmp_path / "all").steps == 0
    trained(mlp(), tmp_path / "enough", gradients="store:6", gradient_budget=33 * one)
    with pytest.raises(RecordError, match=r"one more batch of 8 examples .* are written"):
        trained(mlp(), tmp_path / "some", gradients="store", gradient_budget=18 * one)
    run = explaind.open(tmp_path / "some")
    assert (run.steps, run.damage()) == (3, [])


def gradients(run):
    return [run.gradients(s, 0, len(row.batch)) for s, row in enumerate(run.block(0, run.steps).rows)]


def check_same(got, want):
    """Two runs with the same stored gradients, bitwise."""
    assert (got.steps, got.identity, got.damage(), want.damage()) == (want.steps, want.identity, [], [])
    for one, other in zip(gradients(got), gradients(want), strict=True):
        same(one, other)


def test_a_recording_that_was_killed_keeps_every_step_and_goes_on(tmp_path, monkeypatch):
    cases.shorten_blocks(monkeypatch)
    want = Loop(tmp_path / "whole").record(11, gradients="store")
    loop = Loop(tmp_path / "run")
    with explaind.record(loop.optimizer, loop.model, loop.path, data=cases.DATA, gradients="store") as recorder:
        while recorder.steps < 8:
            loop.step(recorder)
        recorder._writer._wait()
        shutil.copytree(loop.path, tmp_path / "killed")
    killed = explaind.open(tmp_path / "killed")
    assert (killed.steps, killed.logged, killed.damage()) == (5, 3, [])
    shutil.copytree(killed.path, tmp_path / "lacking")
    shutil.rmtree(tmp_path / "lacking" / "gradient" / "c" / "6")  # as in a copy that was made while it was written
    assert explaind.open(tmp_path / "lacking").logged == 1
    export_run(killed.path, tmp_path / "killed.zip")
    import_run(tmp_path / "killed.zip", tmp_path / "imported")
    for folder in ("killed", "imported"):
        assert repair(tmp_path / folder).after == 8
        check_same(explaind.open(tmp_path / folder), explaind.open(loop.path))
    # Older than the record, so that steps with other batches stand where new ones come; then to the end.
    shutil.move(loop.path, tmp_path / "kept")
    shutil.move(tmp_path / "killed", loop.path)
    check_same(loop.load(4).record(11, resume=True, gradients="store"), want)
    with pytest.raises(RecordError, match="gradients"):
        loop.load(4).record(11, resume=True)


@pytest.mark.filterwarnings("ignore:Object at:zarr.errors.ZarrUserWarning")
def test_damage_to_stored_gradients_is_told_and_cut_off(tmp_path, monkeypatch):
    run = stored(tmp_path / "run")
    chunk = next(file for file in sorted((run.path / "gradient" / "c" / "4").rglob("*")) if file.is_file())
    array = zarr.open_array(run.path / "gradient", mode="r+")
    array[4, 0, 3] = array[4, 0, 3] + 1
    assert explaind.open(run.path).damage() == ["the gradients of the examples of step 4 are not what was recorded"]
    assert "step 4" in from_store(explaind.open(run.path)).verify().reasons[0]
    chunk.write_bytes(chunk.read_bytes()[:9])
    assert explaind.open(run.path).damage() == ["the gradients of the examples of step 4 are not what was recorded"]
    with pytest.raises(StoreError, match="a chunk cannot be read"):
        from_store(explaind.open(run.path))
    assert (repair(run.path).after, explaind.open(run.path).damage()) == (4, [])
    told = json.loads((run.path / "gradient" / "zarr.json").read_text())
    told["shape"][2] = 2**40
    (run.path / "gradient" / "zarr.json").write_text(json.dumps(told))
    with pytest.raises(StoreError, match="not what the manifest says"):
        explaind.open(run.path)


@pytest.mark.parametrize("kind", ["h5", "zip"])
@pytest.mark.filterwarnings("ignore:Object at")  # zarr remarks on any file that is not its own
def test_stored_gradients_come_along_in_a_file(kind, tmp_path):
    if kind == "h5":
        pytest.importorskip("h5py", reason="HDF5 needs h5py")
    run = stored(tmp_path / "run", gradient_dtype="float16")
    export_run(run.path, tmp_path / f"out.{kind}")
    import_run(tmp_path / f"out.{kind}", tmp_path / "back")
    want, got = ({f.relative_to(p): f.read_bytes() for f in p.rglob("*") if f.is_file()} for p in (run.path, tmp_path / "back"))
    assert got == want
    if kind == "zip":
        zipped = explaind.open(tmp_path / "out.zip")
        check_same(zipped, run)
        tree = xarray.open_datatree(zarr.storage.ZipStore(tmp_path / "out.zip", mode="r"), engine="zarr", consolidated=False)
        assert tree["gradient"].shape == (7, 5, 26)


def test_the_command_line_stores_and_takes_them(tmp_path, capsys):
    config, run = str(Path(__file__).parent / "small.toml"), tmp_path / "run"
    options = ["--train.steps", "4", "--train.gradients", "store"]
    assert main(["record", config, "--out", str(run), *options, "--train.gradient_budget", "100kB"]) == 2
    assert "4 steps × " in capsys.readouterr().err
    assert main(["record", config, "--out", str(run), "--overwrite", *options, "--train.gradient_dtype", "float64"]) == 0
    assert main(["decompose", str(run), "--queries", "val:0:2", "--name", "stored"]) == 0
    assert main(["decompose", str(run), "--queries", "val:0:2", "--name", "made", "--products", "materialise"]) == 0
    alike(*(explaind.open_ledger(run / "ledgers" / name) for name in ("stored", "made")), rounding)
    capsys.readouterr()
    assert main(["verify", str(run)]) == 0
    assert main(["info", str(run)]) == 0
    assert "of single examples, float64" in capsys.readouterr().out
    assert main(["doctor", str(run), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["layers"].values()) == {"stored"}


def test_without_data_a_run_must_have_stored_them(tmp_path):
    run = cases.recorded(tmp_path / "run")
    with pytest.raises(RequestError, match="data and losses of the training are needed"):
        from_store(run)
    with pytest.raises(RequestError, match="stores no gradients"):
        cases.decomposed(run, products="stored")
    with pytest.raises(RequestError, match="stores no gradients"):
        run.gradients(0, 0, 1)
    assert RunVerdict.of_bytes(stored(tmp_path / "stored")).replay_error.shape == (7, 4)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.out, self.reentrant = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Dropout(0.3)), nn.Linear(8, 2), reentrant

    def forward(self, x):
        return self.out(checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_change_nothing(reentrant, tmp_path):
    torch.manual_seed(0)
    model, data = Checkpointed(reentrant), TensorDataset(DATA.tensors[0].clone(), DATA.tensors[1])
    want = one_by_one(copy.deepcopy(model.body).append(model.out), data)
    rounding(step(model, data, tmp_path / "run").gradients(0, 0, 16), want.numpy())


def test_under_autocast_they_are_those_of_lower_precision(tmp_path):
    model = mlp()
    want = one_by_one(copy.deepcopy(model), DATA).numpy()
    run = step(model, DATA, tmp_path / "run", around=lambda: torch.autocast("cpu", torch.bfloat16))
    found = run.gradients(0, 0, 16)
    assert 0 < abs(found - want).max() <= 0.03 * abs(want).max()


@pytest.mark.parametrize("given", [False, True])
def test_a_training_that_draws_random_numbers_is_not_disturbed(given, tmp_path):
    def make():
        torch.manual_seed(0)
        more = [nn.BatchNorm1d(8)] if given else [nn.LayerNorm(8)]
        return nn.Sequential(nn.Linear(12, 8), *more, nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 2))

    options = {"losses": losses, "data": DATA} if given else {}
    alone, watched = make(), make()
    plain = trained(alone, None)
    want = state(alone, plain)
    watched = make()
    assert state(watched, trained(watched, tmp_path / "run", gradients="store", **options)) == want
    for mine, theirs in zip(watched.buffers(), alone.buffers(), strict=True):
        same(mine.numpy(), theirs.numpy())
    for module in watched.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_what_fails_at_the_start_leaves_no_hooks(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "taken").touch()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(StoreError, match="something here already"):
        explaind.record(optimizer, model, tmp_path / "run", gradients="store")
    model[0].lock = threading.Lock()
    with pytest.raises(RecordError, match="the model cannot be copied"):
        explaind.record(optimizer, model, tmp_path / "other", gradients="store", losses=losses, data=DATA)
    assert not any(module._forward_hooks for module in model.modules())


def test_losses_that_fail_are_told_in_a_line(tmp_path):
    broken = {"losses": lambda model, batch: model(batch[0]) @ batch[0], "data": DATA}
    assert "RuntimeError" in refused("cannot be computed once more", mlp(), DATA, tmp_path / "broken", **broken)


def test_losses_are_of_no_use_within_a_closure(tmp_path):
    model, data = problem_of("bare")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.record(optimizer, model, tmp_path / "run", gradients="store", losses=losses, data=data) as recorder:
        recorder.examples(torch.arange(6))
        with pytest.raises(RecordError, match="a step with a closure"):
            optimizer.step(lambda: losses(model, data[:]).mean().backward())


def test_the_budget_counts_what_a_run_has_that_goes_on(tmp_path):
    model = mlp()
    trained(model, tmp_path / "run", steps=1, gradients="store")
    with pytest.raises(RecordError, match=r"one more batch of 3 examples .* are written"):
        trained(model, tmp_path / "run", steps=1, gradients="store", gradient_budget=5 * 122 * 4, resume=True)


@pytest.mark.parametrize("array", ["part", "checksum_gradient", "gradient"])
def test_what_is_sound_before_a_damaged_chunk_stays(array, tmp_path, monkeypatch):
    cases.shorten_blocks(monkeypatch)
    run = stored(tmp_path / "run")
    chunks = sorted(
        (file for file in (run.path / array / "c").rglob("*") if file.is_file()),
        key=lambda f: [int(n) for n in f.parts[f.parts.index("c") + 1 :]],
    )
    chunks[-1].write_bytes(b"not a chunk")
    sound = explaind.open(run.path).sound()
    assert 0 < sound < run.steps
    assert repair(run.path).after == sound
    assert explaind.open(run.path).damage() == []


@pytest.mark.parametrize("asked", [{"gradients": "store:100"}, {"gradients": "store", "steps": [(0, 102)]}], ids=["told", "windows"])
def test_the_budget_of_a_run_that_goes_on_is_held_against_all_steps_to_come(asked, tmp_path):
    """Before the first of them, with what the run has of those before."""
    model, one = mlp(), 122 * 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for options in ({"gradients": "store", "steps": asked.get("steps")}, {**asked, "resume": True, "gradient_budget": 299 * one}):
        with explaind.record(optimizer, model, tmp_path / "run", **options) as recorder:
            wanted = pytest.raises(RecordError, match=r"budget.* = 100 steps × 3 examples × .* 2.86 KiB are written")
            for _ in range(2):
                with wanted if "resume" in options else nullcontext():
                    recorder.examples([0, 1, 2])
                    optimizer.zero_grad()
                    losses(model, DATA[:3]).mean().backward()
                    optimizer.step()
                if "resume" in options:
                    break
    assert explaind.open(tmp_path / "run").steps == 2
