"""What clipping made of a gradient is found from two sizes of every tensor of it."""

import pytest
import torch

from explaind.kernel.layout import Layout
from explaind.kernel.realised import realised
from explaind.replay.steps import Step
from explaind.rules import Filter
from explaind.store.manifest import Layer
from tests import cases
from tests.closeness import algebra

SIZES = (12, 1, 30, 7)
STARTS = (0, 12, 13, 43)
LAYOUT = Layout(tuple(Layer(f"{i}", (n,), start, n, 0) for i, (n, start) in enumerate(zip(SIZES, STARTS, strict=True))))


def gradients(seed):
    """Of numbers that differ by orders of magnitude, and with zeros."""
    made = [cases.normal(n, seed=seed + i) * (2 * cases.normal(n, seed=seed + i + 50)).exp() for i, n in enumerate(SIZES)]
    return [torch.where(torch.arange(len(g)) % 5 == 4, 0.0, g) for g in made]


def by_norm(gs, size):
    c = min(1.0, size / float(torch.cat(gs).norm()))
    return [c * g for g in gs]


def by_value(gs, most):
    return [g.clamp(-most, most) for g in gs]


CLIPPED = {
    "nothing": lambda gs: gs,
    "norm": lambda gs: by_norm(gs, 2.0),
    "value": lambda gs: by_value(gs, 0.5),
    "every number cut": lambda gs: by_value(gs, 1e-9),
    "value, then norm": lambda gs: by_norm(by_value(gs, 0.5), 1.0),
    "norm, then value": lambda gs: by_value(by_norm(gs, 2.0), 0.3),
    "apart": lambda gs: [*by_norm(gs[:2], 0.5), *by_value(gs[2:], 0.2)],
    "apart, nearly alike": lambda gs: [*by_norm(gs[:2], 0.5 * float(torch.cat(gs[:2]).norm())), *by_norm(gs[2:], 0.495)],
    "each in both ways": lambda gs: [by_value(by_norm([g], 0.5), 0.2)[0] for g in gs],
    "zero": lambda gs: [0.0 * g for g in gs],
    "one is zero": lambda gs: [*by_norm(gs[:1], 0.5), 0.0 * gs[1], *gs[2:]],
}


def found(gs, consumed):
    gradient, zero = torch.cat(gs), torch.zeros(sum(SIZES), dtype=torch.float64)
    sizes = torch.stack([torch.stack([g.norm(), g.abs().max()]) for g in consumed])
    return realised(Step(0, zero, zero, zero, Filter(E=1.0), (), (), sizes), gradient, LAYOUT).filter.sign


@pytest.mark.parametrize("name", CLIPPED)
def test_the_consumed_gradient_is_found_to_the_last_number(name):
    for seed in range(0, 2000, 100):
        gs = gradients(seed)
        want = CLIPPED[name](gs)
        algebra(found(gs, want) * torch.cat(gs), torch.cat(want), f"seed {seed}")


@pytest.mark.parametrize("name", ["norm", "nothing"])
def test_one_factor_stays_one_number(name):
    assert isinstance(found(gradients(0), CLIPPED[name](gradients(0))), float)


@pytest.mark.parametrize(
    "touch", [lambda g: 2.0 * g, lambda g: g + 1.0, lambda g: torch.full_like(g, torch.nan)], ids=["larger", "moved", "nan"]
)
def test_what_is_no_clipping_is_left_alone(touch):
    assert found(gradients(0), [touch(g) for g in gradients(0)]) == 1.0
