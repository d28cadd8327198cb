"""What training loops do between a backward pass and a step, and around them; each ledger is checked to the last number."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import explaind
from tests import cases, reference
from tests.closeness import algebra, same
from tests.test_ledger import check_against_reference


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    cases.shorten_blocks(monkeypatch)


def closes(ledger, arithmetic=1e-10):
    verdict = ledger.verify()
    assert verdict.ok, verdict.reasons
    assert verdict.maxima["closure"] <= 1e-9
    assert verdict.maxima["arithmetic"] <= arithmetic * verdict.maxima["movement"]
    return ledger


def begun(path, network=cases.mlp, make=lambda params: torch.optim.AdamW(params, lr=0.03), **options):
    model = cases.Problem("loop", network).model()
    optimizer = make(list(model.parameters()))
    return model, optimizer, explaind.record(optimizer, model, path, **options)


def backward(model, recorder, ids, scale=1.0, part=1):
    recorder.examples(ids)
    x, y = cases.DATA[torch.tensor(ids)]
    (scale * cases.losses(model, (x, y)).mean() / part).backward()


def step(model, optimizer, recorder, ids):
    optimizer.zero_grad()
    backward(model, recorder, ids)
    optimizer.step()


BATCHES = ([0, 1, 2], [3, 4], [5, 6, 7, 0], [1, 2])


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("lost", [(1,), (0, 1), (3,)], ids=str)
def test_steps_that_a_grad_scaler_skips_are_no_steps(lost, to_none, tmp_path):
    model, optimizer, recorder = begun(tmp_path / "run")
    with recorder:
        for i, ids in enumerate(BATCHES):
            optimizer.zero_grad(set_to_none=to_none)
            backward(model, recorder, ids, scale=1024.0)
            for p in model.parameters():
                p.grad.div_(1024.0)  # GradScaler.unscale_
            if i not in lost:
                optimizer.step()
    run = explaind.open(tmp_path / "run")
    kept = [ids for i, ids in enumerate(BATCHES) if i not in lost]
    assert [row.batch.tolist() for row in run.block(0, run.steps).rows] == kept
    closes(cases.decomposed(run))


def test_a_real_grad_scaler_is_followed(tmp_path):
    """It halves its scale when a loss overflows, and skips the step."""
    model, optimizer, recorder = begun(tmp_path / "run", make=lambda params: torch.optim.SGD(params, lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    with recorder:
        for i, ids in enumerate(BATCHES):
            recorder.examples(ids)
            optimizer.zero_grad()
            x, y = cases.DATA[torch.tensor(ids)]
            loss = cases.losses(model, (x, y)).mean() * (torch.inf if i == 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            scaler.step(optimizer)
            scaler.update()
    run = explaind.open(tmp_path / "run")
    assert [row.batch.tolist() for row in run.block(0, run.steps).rows] == [BATCHES[i] for i in (0, 1, 3)]
    closes(cases.decomposed(run))


FUSED = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.03, fused=True),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.03, weight_decay=0.1, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, fused=True),
}


def scaled_training(model, optimizer, recorder, lost=(), before_step=lambda scaler: None):
    """A GradScaler hands a fused optimizer scaled gradients, and calls its step also where they overflowed."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=2)
    for i, ids in enumerate(BATCHES):
        if recorder is not None:
            recorder.examples(ids)
        optimizer.zero_grad()
        x, y = cases.DATA[torch.tensor(ids)]
        scaler.scale(cases.losses(model, (x, y)).mean() * (torch.inf if i in lost else 1.0)).backward()
        before_step(scaler)
        scaler.step(optimizer)
        scaler.update()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("lost", [(), (2,), (1, 3)], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_a_step_that_a_fused_optimizer_skips_is_none(name, lost, tmp_path):
    model, optimizer, recorder = begun(tmp_path / "run", make=FUSED[name])
    with recorder:
        got = scaled_training(model, optimizer, recorder, lost)
    model = cases.Problem("loop", cases.mlp).model()
    want = scaled_training(model, FUSED[name](list(model.parameters())), None, lost)
    for one, other in zip(got, want, strict=True):
        same(one, other)
    run = explaind.open(tmp_path / "run")
    assert [row.batch.tolist() for row in run.block(0, run.steps).rows] == [ids for i, ids in enumerate(BATCHES) if i not in lost]
    closes(cases.decomposed(run))


def test_scaled_gradients_may_be_clipped_in_front_of_a_fused_optimizer(tmp_path):
    model, optimizer, recorder = begun(tmp_path / "run", make=FUSED["AdamW"])
    with recorder:
        scaled_training(model, optimizer, recorder, (1,), lambda s: nn.utils.clip_grad_norm_(model.parameters(), 0.3 * s.get_scale()))
    run = explaind.open(tmp_path / "run")
    assert all(row.consumed[:, 0].max() <= 0.3 for row in run.block(0, run.steps).rows)
    closes(cases.decomposed(run), arithmetic=1e-5)  # torch's norm, and 1e-6 that it adds


def test_scaled_gradients_may_be_filtered_in_front_of_a_fused_optimizer(tmp_path):
    model = cases.Problem("loop", cases.mlp).model()
    optimizer, told = FUSED["SGD"](model.parameters()), explaind.GrokfastEMA(0.9, 2.0)
    remembered = {}

    def grokfast(scaler):
        for name, p in model.named_parameters():
            remembered[name] = 0.9 * remembered[name] + 0.1 * p.grad if name in remembered else p.grad.clone()
            p.grad.add_(2.0 * remembered[name])

    with explaind.record(optimizer, model, tmp_path / "run", gradient_filter=told) as recorder:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for ids in BATCHES:
            optimizer.zero_grad()
            backward(model, recorder, ids, scale=1024.0)
            scaler.scale(torch.ones(()))  # which makes it begin
            grokfast(scaler)
            scaler.step(optimizer)
            scaler.update()
    closes(cases.decomposed(explaind.open(tmp_path / "run")))


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("fused", [False, True])
def test_of_two_optimizers_one_may_skip_its_step(lost, fused, tmp_path):
    """Its parameters stay where they are; the other's step is a step."""

    def trained(path):
        model = cases.Problem("loop", cases.mlp).model()
        pairs = [torch.optim.AdamW(module.parameters(), lr=0.03, fused=fused) for module in (model[0], model[2])]
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        recorder = None if path is None else explaind.record(pairs, model, path)
        for i, ids in enumerate(BATCHES):
            if recorder is not None:
                recorder.examples(ids)
            model.zero_grad()
            scaler.scale(cases.losses(model, cases.DATA[torch.tensor(ids)]).mean()).backward()
            if i == 1:
                pairs[lost].param_groups[0]["params"][0].grad[0] = torch.inf
            for optimizer in pairs:
                scaler.step(optimizer)
            scaler.update()
        if recorder is not None:
            recorder.close()
        return list(model.parameters())

    for got, want in zip(trained(tmp_path / "run"), trained(None), strict=True):
        same(got.detach(), want.detach())
    run = explaind.open(tmp_path / "run")
    rows = run.block(0, run.steps).rows
    assert [row.batch.tolist() for row in rows] == list(BATCHES)
    assert [(row.age < 0).tolist() for row in rows] == [[i == 1 and k // 2 == lost for k in range(4)] for i in range(4)]
    assert run.damage() == []


class Experts(nn.Module):
    """Each example goes through one of two, so that a micro-batch may leave one without a gradient."""

    def __init__(self):
        super().__init__()
        self.shared, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return (self.left if (x[:, 0] > 0).all() else self.right)(self.shared(x).tanh())


def test_a_parameter_that_a_micro_batch_does_not_reach_keeps_the_others_share(tmp_path):
    model, optimizer, recorder = begun(tmp_path / "run", Experts)
    left = torch.nonzero(cases.DATA.tensors[0][:, 0] > 0)[:, 0].tolist()
    right = [i for i in range(8) if i not in left]
    with recorder:
        for _ in range(3):
            optimizer.zero_grad()
            for ids in (left[:2], right[:2], left[2:]):
                backward(model, recorder, ids)
            optimizer.step()
    rows = explaind.open(tmp_path / "run").block(0, 3).rows
    assert all(sorted(row.batch.tolist()) == sorted([*left, *right[:2]]) for row in rows)


def test_a_closure_makes_the_gradient_inside_the_step(tmp_path):
    model, optimizer, recorder = begun(tmp_path / "run")
    with recorder:
        for ids in BATCHES:

            def closure(ids=ids):
                optimizer.zero_grad()
                backward(model, recorder, ids)

            optimizer.step(closure)
    run = explaind.open(tmp_path / "run")
    assert run.steps == len(BATCHES)
    closes(cases.decomposed(run))


def test_hyper_parameters_that_are_changed_by_hand_are_recorded_as_they_stand(tmp_path):
    model, optimizer, recorder = begun(tmp_path / "run")
    with recorder:
        for i, ids in enumerate(BATCHES):
            optimizer.param_groups[0].update(lr=0.01 * (i + 1), betas=(0.5 + 0.1 * i, 0.9), weight_decay=0.1 * i)
            step(model, optimizer, recorder, ids)
    closes(cases.decomposed(explaind.open(tmp_path / "run")))


@pytest.mark.parametrize("name", ["sgd momentum dampening", "sgd nesterov", "rmsprop centred momentum maximize"])
def test_momentum_that_is_switched_off_rests_until_it_is_switched_on(name, tmp_path):
    off_and_on = {"momentum": (0.8, 0.0, 0.0, 0.5)}
    case = replace(cases.optimizer_named(name), schedule=lambda optimizer: cases.ByHand(optimizer, off_and_on))
    want = reference.Slow(cases.PLAIN, case).solve()
    run = cases.recorded(tmp_path / "run", case=case)
    for view in ("seen", "applied"):
        check_against_reference(cases.decomposed(run, view=view), want, view)


def test_parameters_may_be_frozen_and_given_back(tmp_path):
    model, optimizer, recorder = begun(tmp_path / "run")
    with recorder:
        for i, ids in enumerate(BATCHES):
            model[0].requires_grad_(i != 1)
            step(model, optimizer, recorder, ids)
    run = explaind.open(tmp_path / "run")
    same(run.theta(1)["0.weight"], run.theta(2)["0.weight"])
    ledger = closes(cases.decomposed(run))
    assert not ledger["data"][..., ledger.coords["layer"].tolist().index("0.weight"), 1].any()


def test_parameters_that_are_watched_may_be_added_later(tmp_path):
    model, optimizer, recorder = begun(tmp_path / "run", make=lambda params: torch.optim.AdamW(params[:2], lr=0.03), watch=["2.*"])
    with recorder:
        for i, ids in enumerate(BATCHES):
            if i == 2:
                optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.1})
            step(model, optimizer, recorder, ids)
    run = explaind.open(tmp_path / "run")
    same(run.theta(0)["2.weight"], run.theta(2)["2.weight"])
    assert (run.theta(3)["2.weight"] != run.theta(2)["2.weight"]).any()
    closes(cases.decomposed(run))


def test_several_optimizers_make_a_step_together(tmp_path):
    model = cases.PLAIN.model()
    hidden, others = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    optimizers = [torch.optim.SGD(hidden, lr=0.1, momentum=0.8), torch.optim.AdamW(others, lr=0.03, weight_decay=0.3)]
    with explaind.record(optimizers, model, tmp_path / "run") as recorder:
        for i, ids in enumerate(BATCHES):
            model.zero_grad()
            backward(model, recorder, ids)
            for optimizer in optimizers[: 1 if i == 1 else 2]:
                optimizer.step()
    run = explaind.open(tmp_path / "run")
    assert run.steps == len(BATCHES)
    assert run.manifest.optimizer == "torch.optim.sgd.SGD and torch.optim.adamw.AdamW"
    same(run.theta(1)["0.bias"], run.theta(2)["0.bias"])
    closes(cases.decomposed(run))


@pytest.mark.parametrize("fused", ["none", "first", "second"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_grad_scaler_may_serve_several_optimizers(order, fused, tmp_path):
    """It unscales the gradients of each at that one's step, or leaves it to the kernel of a fused one."""
    model = cases.PLAIN.model()
    hidden, others = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    first = torch.optim.SGD(hidden, lr=0.1, momentum=0.8, fused=fused == "first")
    optimizers = [first, torch.optim.AdamW(others, lr=0.03, weight_decay=0.3, fused=fused == "second")]
    scaler, want = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    with explaind.record(optimizers, model, tmp_path / "run") as recorder:
        for ids in BATCHES:
            recorder.examples(ids)
            model.zero_grad()
            x, y = cases.DATA[torch.tensor(ids)]
            scaler.scale(cases.losses(model, (x, y)).mean()).backward()
            clipped = (hidden, others)[order[0]]
            scaler.unscale_(optimizers[order[0]])
            nn.utils.clip_grad_norm_(clipped, 0.01)
            within = {id(p) for p in clipped}
            want.append([float(p.grad.norm()) / (1.0 if id(p) in within else scaler.get_scale()) for p in model.parameters()])
            for i in order:
                scaler.step(optimizers[i])
            scaler.update()
    run = explaind.open(tmp_path / "run")
    for row, norms in zip(run.block(0, run.steps).rows, want, strict=True):
        np.testing.assert_allclose(row.consumed[:, 0], norms, rtol=1e-5)
    closes(cases.decomposed(run), arithmetic=1e-4)  # torch's norm, and 1e-6 that it adds


def test_random_numbers_are_kept_only_where_a_forward_pass_drew_some(tmp_path):
    problem = cases.Problem("dropout", cases.dropping, trains=lambda s: s in (0, 3))
    run = cases.recorded(tmp_path / "run", problem)
    kept = [row.random is not None for row in run.block(0, run.steps).rows]
    assert kept == [s in (0, 3) for s in range(run.steps)]
    assert run.damage() == []


def test_batch_norm_whose_statistics_matter_has_a_buffers_row(tmp_path):
    problem = cases.WHOLE[2]
    run = cases.recorded(tmp_path / "run", problem)
    ledger = cases.decomposed(run, problem, rule="secant")
    closes(ledger)
    assert ledger.verify().maxima["path"] <= 1e-10
    moved = np.abs(ledger["buffers"]).sum(axis=(0, 1, 3))
    layers = ledger.coords["layer"].tolist()
    assert {layers[i] for i in np.flatnonzero(moved)} == {"1.running_mean", "1.running_var"}
    data = np.abs(ledger["data"]).sum(axis=(0, 1, 2, 4))
    assert not data[moved > 0].any()
    algebra(ledger.to_xarray()["buffers"].sum().item(), ledger["buffers"].sum(), "buffers")


def test_several_recordings_of_one_training(tmp_path):
    """Side by side they are the same run; one that begins later has the momentum from before."""
    model, optimizer, first = begun(tmp_path / "first")
    second = explaind.record(optimizer, model, tmp_path / "second")
    third = None
    for i, ids in enumerate(BATCHES * 2):
        if i == 3:
            third = explaind.record(optimizer, model, tmp_path / "third")
        recorders = [r for r in (first if i <= 5 else None, second, third) if r is not None]
        optimizer.zero_grad()
        for recorder in recorders:
            recorder.examples(ids)
        cases.losses(model, cases.DATA[torch.tensor(ids)]).mean().backward()
        optimizer.step()
        if i == 5:
            first.close()
    for recorder in (second, third):
        recorder.close()
    one, two, three = (explaind.open(tmp_path / name) for name in ("first", "second", "third"))
    assert (one.steps, two.steps, three.steps) == (6, 8, 5)
    same(one.states(0, 7), two.states(0, 7))
    same(three.states(0, 6), two.states(3, 9))
    for run in (one, two, three):
        ledger = closes(cases.decomposed(run))
    assert np.abs(ledger["momentum0"]).max() > 0


def clip_each(model):
    for p in model.parameters():
        nn.utils.clip_grad_norm_([p], 0.02)


@pytest.mark.parametrize("touch", [cases.clip_halves, clip_each])
@pytest.mark.parametrize("name", ["sgd momentum", "adamw"])
def test_parts_of_a_model_may_be_clipped_apart(touch, name, tmp_path):
    problem, case = cases.Problem("clipped apart", touch=touch), cases.optimizer_named(name)
    want = reference.Slow(problem, case).solve()
    run = cases.recorded(tmp_path / "run", problem, case)
    check_against_reference(cases.decomposed(run, problem), want)


def value_then_norm(model):
    nn.utils.clip_grad_value_(model.parameters(), 0.05)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def norm_then_value(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    nn.utils.clip_grad_value_(model.parameters(), 0.05)


def each_its_own(model):
    nn.utils.clip_grad_norm_(model[0].parameters(), 0.05)
    nn.utils.clip_grad_value_(model[2].parameters(), 0.02)


def all_of_it(model):
    value_then_norm(model[0])
    norm_then_value(model[2])
    nn.utils.clip_grad_norm_(model.parameters(), 0.06)


def zeroed(model):
    model[0].weight.grad.zero_()


def clipped_and_zeroed(model):
    norm_then_value(model)
    zeroed(model)


@pytest.mark.parametrize("touch", [value_then_norm, norm_then_value, each_its_own, all_of_it, zeroed, clipped_and_zeroed])
@pytest.mark.parametrize("name", ["sgd momentum", "adamw"])
def test_gradients_may_be_clipped_in_both_ways_and_set_to_zero(touch, name, tmp_path):
    problem, case = cases.Problem("clipped in both ways", steps=cases.MICRO_BATCHES, touch=touch), cases.optimizer_named(name)
    want = reference.Slow(problem, case).solve()
    run = cases.recorded(tmp_path / "run", problem, case)
    check_against_reference(cases.decomposed(run, problem), want)


def noise(model):
    for p in model.parameters():
        p.grad.add_(0.3 * torch.randn_like(p) * p.grad.abs().max())


def centred(model):
    for p in model.parameters():
        if p.ndim > 1:
            p.grad.sub_(p.grad.mean(1, keepdim=True))


def rows_apart(model):
    """Clipping of each neuron's gradient by its norm: neither a factor of a whole tensor nor a bound of its numbers."""
    for p in model.parameters():
        p.grad.mul_((0.02 / p.grad.norm(dim=-1, keepdim=True)).clamp(max=1.0))


def some_of_it_zeroed(model):
    """A tensor, but for one row."""
    model[0].weight.grad[1:] = 0.0


@pytest.mark.parametrize("touch", [noise, centred, rows_apart, some_of_it_zeroed])
def test_what_else_is_done_to_a_gradient_is_no_clipping(touch, tmp_path):
    run = cases.recorded(tmp_path / "run", cases.Problem("changed", touch=touch))
    assert not cases.decomposed(run).verify().ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casts_in_a_loss_are_followed_in_the_precision_of_the_kernel(dtype, tmp_path):
    """A model in low precision whose loss is computed in float32, as is usual."""
    data = torch.utils.data.TensorDataset(cases.DATA.tensors[0].to(dtype), cases.DATA.tensors[1])

    def losses(model, batch):
        logits = model(batch[0])
        shifted = torch.zeros(2, dtype=torch.float32) + logits.to(torch.float32)
        return nn.functional.cross_entropy(shifted.softmax(-1, dtype=torch.float32).log(), batch[1], reduction="none").float()

    model = cases.PLAIN.model().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with explaind.record(optimizer, model, tmp_path / "run") as recorder:
        for ids in BATCHES * 2:
            recorder.examples(ids)
            optimizer.zero_grad()
            losses(model, data[torch.tensor(ids)]).mean().backward()
            optimizer.step()
    run = explaind.open(tmp_path / "run")
    for kernel in (torch.float64, torch.float32):
        ledger = explaind.decompose(run, cases.PLAIN.model(), data=data, losses=losses, queries=data[:3], measure=losses, dtype=kernel)
        assert ledger.verify().ok, ledger.verify().reasons
        found = ledger.verify().maxima
        assert ledger["final"].dtype == np.float64
        assert found["closure"] <= (1e-9 if kernel == torch.float64 else 1e-4)
        assert found["arithmetic_share"] <= {torch.bfloat16: 0.5, torch.float16: 0.1, torch.float32: 1e-4}[dtype]


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.begin, self.first, self.last, self.reentrant = nn.Linear(3, 3), nn.Linear(3, 5), nn.Linear(5, 2), reentrant

    def forward(self, x):
        return self.last(checkpoint(lambda t: torch.tanh(self.first(t)), self.begin(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("products", ["auto", "jvp"])
def test_activation_checkpoints_change_nothing(reentrant, products, tmp_path):
    def network():
        return Checkpointed(reentrant)

    run = cases.recorded(tmp_path / "run", cases.Problem("checkpoints", network))
    closes(cases.decomposed(run, cases.Problem("checkpoints", network), products=products, rule="auto"))
