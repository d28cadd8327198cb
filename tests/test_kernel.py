"""The mathematics on functions of 24 numbers: no run, no disk."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from explaind.errors import ExplaindError, RequestError
from explaind.kernel.choosing import path_rule
from explaind.kernel.gradients import separable
from explaind.kernel.layout import Layout
from explaind.kernel.measures import Measures
from explaind.kernel.path import Segment, average, discrete_gradient
from explaind.kernel.products import Products
from explaind.kernel.resolution import check_budget, resolution
from explaind.kernel.whole import batch_gradient
from explaind.replay.steps import Part
from explaind.store.manifest import Layer
from tests import cases
from tests.cases import normal
from tests.closeness import algebra, falls, same

LAYOUT = Layout((Layer("w", (4, 3), 0, 12, 0), Layer("b", (4,), 12, 4, 0), Layer("v", (2, 4), 16, 8, 0)))
THETA = normal(24, seed=5)
COSTATES = normal(6, 24, seed=6)
PART = Part((normal(5, 3, seed=7), torch.tensor([0, 1, 1, 0, 1])), np.arange(5), normal(5, seed=8))


def network(p, x):
    return (x @ p["w"].T + p["b"]).tanh() @ p["v"].T


def separate(p, batch):
    return F.cross_entropy(network(p, batch[0]), batch[1], reduction="none")


def coupled(p, batch):
    """Every loss depends on the mean of the batch, as with train-mode BatchNorm or a contrastive loss."""
    logits = network(p, batch[0])
    return F.cross_entropy(logits - logits.mean(0), batch[1], reduction="none")


def example_gradients(losses):
    """∇ℓ_i by plain autograd: [example, param]"""
    theta = THETA.clone().requires_grad_()
    return torch.stack([torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in losses(LAYOUT.split(theta), PART.batch)])


def summed(values, finest):
    """[…, param] to the finest axis that is kept, which goes first"""
    parts = {"none": [slice(None)], "layer": LAYOUT.slices, "param": [slice(i, i + 1) for i in range(24)]}[finest]
    return torch.stack([values[..., cut].sum(-1) for cut in parts])


def products(losses, finest, route, chunk=1 << 20):
    """[fine, row, example]"""
    made = Products(losses, LAYOUT, finest, route, chunk)(THETA, PART, COSTATES)
    pieces = [(span, dots.clone()) for span, dots in made]
    assert [i for span, _ in pieces for i in range(span.start, span.stop)] == list(range(5))
    return torch.cat([dots for _, dots in pieces], dim=-1)


@pytest.mark.parametrize("chunk", [1, 1 << 20], ids=["one example at a time", "all at once"])
@pytest.mark.parametrize(
    ("finest", "route"),
    [
        ("none", "materialise"),
        ("layer", "materialise"),
        ("param", "materialise"),
        ("none", "jvp"),
        ("layer", "jvp"),
        ("none", "auto"),
        ("param", "auto"),
        ("param", "ghost"),
    ],
)
def test_every_route_give_the_dot_products_of_plain_autograd(finest, route, chunk):
    want = summed(torch.einsum("rp,ep->rep", COSTATES, example_gradients(separate)), finest)
    algebra(products(separate, finest, route, chunk), want)


def halted(p, batch):
    """A target without gradients, which forward derivatives do not know of."""
    logits = network(p, batch[0])
    with torch.no_grad():
        target = network(p, batch[0]).roll(1, 0)
    return (logits - target).square().sum(1)


@pytest.mark.parametrize("losses", [coupled, halted])
@pytest.mark.parametrize(("finest", "route"), [("none", "jvp"), ("layer", "jvp"), ("none", "auto"), ("layer", "auto"), ("param", "auto")])
def test_coupled_losses_take_the_whole_batch(losses, finest, route):
    if losses is halted and route == "jvp":
        pytest.skip("refused below")
    want = summed(torch.einsum("rp,ep->rep", COSTATES, example_gradients(losses)), finest)
    algebra(products(losses, finest, route), want)
    algebra(products(losses, finest, route, chunk=1), want)


def test_a_part_of_one_example_tells_nothing_of_the_others():
    made = Products(coupled, LAYOUT, "layer")
    one = Part(tuple(t[:1] for t in PART.batch), PART.ids[:1], PART.weights[:1])
    alone = THETA.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(coupled(LAYOUT.split(alone), one.batch).sum(), alone)
    ((_, dots),) = made(THETA, one, COSTATES)
    algebra(dots[..., 0], summed(COSTATES * gradient, "layer"), scale=1.0)
    want = summed(torch.einsum("rp,ep->rep", COSTATES, example_gradients(coupled)), "layer")
    algebra(torch.cat([dots for _, dots in made(THETA, PART, COSTATES)], dim=-1), want)


def test_losses_may_be_of_another_kind_in_another_mode():
    now = [coupled]
    made = Products(lambda p, batch: now[0](p, batch), LAYOUT, "layer")
    for losses, mode in ((coupled, (True,)), (separate, (False,)), (coupled, (True,))):
        now[0] = losses
        want = summed(torch.einsum("rp,ep->rep", COSTATES, example_gradients(losses)), "layer")
        algebra(torch.cat([dots for _, dots in made(THETA, PART, COSTATES, None, mode)], dim=-1), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [1e-2, 1e-4])
def test_a_weak_coupling_is_seen(share, dtype):
    def losses(p, batch):
        logits = network(p, batch[0])
        return 10.8 + 0.05 * logits[:, 0] + share * logits.softmax(1).mean(0).square().sum()

    batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in PART.batch)
    assert not separable(losses, LAYOUT.split(THETA.to(dtype)), batch)
    assert separable(lambda p, b: 10.8 + 0.05 * network(p, b[0])[:, 0], LAYOUT.split(THETA.to(dtype)), batch)


def test_a_coupling_that_a_zero_head_hides_is_seen():
    theta = THETA.clone()
    theta[16:] = 0.0
    assert not separable(mixed, LAYOUT.split(theta), QUERIES)
    assert separable(measure, LAYOUT.split(theta), QUERIES)


@pytest.mark.parametrize(
    ("losses", "finest", "route", "message"),
    [
        (coupled, "none", "ghost", "losses of a batch depend on each other.*'ghost'.*use auto"),
        (coupled, "layer", "materialise", "losses of a batch depend on each other.*use auto"),
        (separate, "param", "jvp", "use auto, or keep 'layer'"),
        (halted, "layer", "jvp", "not what the training differentiated"),
    ],
)
def test_products_that_would_be_wrong_are_refused(losses, finest, route, message):
    with pytest.raises(RequestError, match=message) as caught:
        products(losses, finest, route)
    assert "\n" not in str(caught.value)


def test_the_batch_gradient_is_the_weighted_sum_over_parts():
    other = Part((normal(2, 3, seed=9), torch.tensor([0, 1])), np.arange(2), torch.ones(2, dtype=torch.float64))
    theta = THETA.clone().requires_grad_()
    total = sum(separate(LAYOUT.split(theta), part.batch) @ part.weights for part in (PART, other))
    algebra(batch_gradient(separate, LAYOUT, THETA, (PART, other)), torch.autograd.grad(total, theta)[0])


def test_a_layout_splits_adds_and_dots_by_layer():
    parts = LAYOUT.split(COSTATES)
    assert {name: tuple(t.shape) for name, t in parts.items()} == {"w": (6, 4, 3), "b": (6, 4), "v": (6, 2, 4)}
    back = torch.zeros_like(COSTATES)
    LAYOUT.add(back, parts, 2.0)
    same(back, 2 * COSTATES)
    algebra(LAYOUT.dots(COSTATES, THETA), summed(COSTATES * THETA, "layer"))


def measure(p, queries):
    return network(p, queries).log_softmax(-1)


def mixed(p, queries):
    """Each query's measure depends on the other queries."""
    values = measure(p, queries)
    return values - values.mean(0)


QUERIES = normal(3, 3, seed=10)


@pytest.mark.parametrize("function", [measure, mixed])
@pytest.mark.parametrize("keep", [{"query", "output"}, {"query"}, {"output"}, set()], ids=lambda keep: "+".join(sorted(keep)) or "nothing")
def test_measures_are_summed_over_what_is_not_kept_before_they_are_differentiated(function, keep):
    measures = Measures(function, QUERIES, LAYOUT, frozenset(keep), THETA)
    theta = THETA.clone().requires_grad_()
    dims = [d for d, axis in enumerate(("query", "output")) if axis not in keep]
    values = (function(LAYOUT.split(theta), QUERIES).sum(dims) if dims else function(LAYOUT.split(theta), QUERIES)).reshape(-1)
    gradients = torch.stack([torch.autograd.grad(v, theta, retain_graph=True)[0] for v in values])
    assert measures.by_query == (function is measure and "query" in keep)
    algebra(measures.values(THETA), values.detach())
    algebra(measures.slopes(THETA, COSTATES[0]), gradients @ COSTATES[0], scale=1.0)
    found = torch.zeros_like(gradients)
    measures.add_gradients(found, [measures.node(THETA, 0.5)])
    algebra(found, 0.5 * gradients, scale=1.0)


def step(size):
    """A step of that size in a fixed direction through the same middle, and what every measure did on it."""
    measures = Measures(measure, QUERIES, LAYOUT, frozenset({"query", "output"}), THETA)
    delta = size * normal(24, seed=11)
    start = THETA - delta / 2
    change = measures.values(start + delta) - measures.values(start)
    return measures, Segment(start, start + delta, change, torch.zeros_like(change))


def averaged(rule, measures, segment):
    """(ḡ, path, number of nodes or parts)"""
    mean = torch.full((measures.count, len(segment.theta)), torch.nan, dtype=segment.theta.dtype)  # whatever stood there before
    path, recipe = average(rule, measures, segment, mean)
    return mean, path, recipe.count


def miss(spec, size):
    return float(averaged(path_rule(spec, 1.0), *step(size))[1].abs().max())


@pytest.mark.parametrize("n", [1, 2, 3])
def test_gauss_misses_like_the_step_to_the_power_two_n_plus_one(n):
    falls([miss(f"gauss:{n}", size) for size in (0.16, 0.08, 0.04)], 2 ** (2 * n + 1), f"gauss:{n}")


def test_midpoint_misses_like_one_over_the_square_of_its_nodes():
    falls([miss(f"midpoint:{n}", 0.5) for n in (16, 32, 64, 128)], 4.0)


@pytest.mark.parametrize("size", [0.01, 0.3, 1.0, 3.0])
def test_the_adaptive_rule_meets_its_tolerance_and_a_looser_one_costs_less(size):
    nodes = []
    for tol in (1e-8, 1e-5, 1e-2):
        rule = path_rule("adaptive", tol)
        for _ in range(3):  # it starts where its last search ended
            measures, segment = step(size)
            _, path, count = averaged(rule, measures, segment)
        assert torch.all(path.abs() <= tol * segment.change.abs())
        nodes.append(count)
    assert nodes == sorted(nodes, reverse=True)
    assert nodes[0] > nodes[-1]


def test_the_adaptive_rule_forgives_a_measure_that_hardly_moves():
    measures, segment = step(1.0)
    forgiving = Segment(segment.theta, segment.after, segment.change, torch.full_like(segment.change, 100.0))
    _, path, nodes = averaged(path_rule("adaptive", 1e-3), measures, forgiving)
    assert nodes < averaged(path_rule("adaptive", 1e-3), measures, segment)[2]
    assert path.abs().max() <= 1e-3 * 100.0


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0])
def test_the_discrete_gradient_closes_every_step_exactly(size):
    measures, segment = step(size)
    mean, path, _ = averaged(path_rule("gauss:1", 1.0), measures, segment)
    algebra(discrete_gradient(mean, path, segment.delta) @ segment.delta, segment.change, scale=1.0)


@pytest.mark.parametrize("spec", ["gauss", "gauss:0", "gauss:-1", "gauss:x", "simpson:3", "secant:", "secant:0", "auto:3"])
def test_an_unknown_path_rule_is_refused_by_name(spec):
    with pytest.raises(RequestError, match=f"unknown path rule.*'{spec}'"):
        path_rule(spec, 1e-3)


@pytest.mark.parametrize("tol", [0.0, -1.0, float("nan")])
def test_a_tolerance_must_be_positive(tol):
    with pytest.raises(RequestError, match="tolerance must be positive"):
        path_rule("auto", tol)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"keep": ("query", "neuron")}, "unknown axis.*got neuron"),
        ({"keep": ("layer", "param")}, "both 'layer' and 'param'"),
        ({"view": "both"}, "'seen' or 'applied'.*'both'"),
        ({"windows": 0}, "at least one step.*got 0"),
        ({"keep": ("query",), "windows": 5}, "windows group the step axis, which is not kept"),
    ],
)
def test_a_resolution_that_makes_no_sense_is_refused(asked, message):
    with pytest.raises(RequestError, match=message) as caught:
        resolution(**{"keep": ("query", "step"), "steps": 10, "view": "seen", "windows": 1, **asked})
    assert "\n" not in str(caught.value)


def test_windows_count_the_last_short_one():
    wanted = resolution(("step",), 10, "seen", 4)
    assert (wanted.step_entries, [wanted.entry(s) for s in range(10)]) == (3, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2])


def test_the_budget_names_the_size_and_the_fewest_axes_whose_sum_fits():
    sizes = {"query": 2, "output": 100, "example": 1000, "layer": 10}
    check_budget(sizes, sizes, 8, 16_000_000)
    with pytest.raises(RequestError) as caught:
        check_budget(sizes, sizes, 8, 15_999_999)
    assert "got 15.3 MiB; sum over query (7.63 MiB) or output (156 KiB) or example (15.6 KiB) or layer (1.53 MiB)" in str(caught.value)
    with pytest.raises(RequestError, match=r"sum over output\+example \(160 B\)"):
        check_budget(sizes, sizes, 8, 160)


IMPOSSIBLE = (
    ({"budget": 1000}, r"7 step\); expected at most 1e\+03 B; got .*KiB; sum over"),
    ({"device": "abacus"}, "device cannot be used.*'abacus'"),
    ({"products": "spectre"}, "unknown products.*materialise.*'spectre'"),
    ({"closure": "exact"}, "unknown closure.*discrete-gradient.*'exact'"),
    ({"dtype": torch.float16}, "unknown dtype.*torch.float16"),
    ({"rule": "exact"}, "unknown path rule.*'exact'"),
    ({"save": Path(__file__).parent}, "something here already"),
    ({"measure": lambda model, batch: model(batch).sum()}, r"one number per query.*got \(\)"),
    ({"measure": lambda model, batch: model(batch).argmax(-1)}, "one number per query"),
    ({"measure": lambda model, batch: model(batch)[:, 0]}, "keep holds 'output', but the measure gives one number per query"),
    ({"measure": lambda model, batch: model(batch) / 0}, "the measure is not finite"),
)


@pytest.mark.parametrize(("asked", "message"), IMPOSSIBLE, ids=[" ".join(asked) + f" {i}" for i, (asked, _) in enumerate(IMPOSSIBLE)])
def test_an_impossible_request_is_refused_before_any_work(asked, message, tmp_path):
    def never(model, batch):
        raise AssertionError("a loss was computed")

    with pytest.raises(ExplaindError, match=message) as caught:
        cases.decomposed(cases.recorded(tmp_path / "run"), losses=never, **asked)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_step_cannot_be_decomposed(tmp_path):
    with pytest.raises(RequestError, match="no complete step"):
        cases.decomposed(cases.recorded(tmp_path / "run", cases.Problem("none", steps=())))
