"""Bilinear operations: δ(xy) = δx · mean(y) + mean(x) · δy."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from explaind.kernel.secant.pair import Pair, at, product
from explaind.kernel.secant.rules import RULES, rule


@rule("mul mm bmm")
def bilinear(op: Any, x: Any, y: Any) -> Pair:
    return product(op, x, y)


def linear(op: Any, x: "Pair | Tensor", weight: Pair, bias: Any = None) -> Pair:
    """x Wᵀ + c for a parameter W; the call is one that ``Factored`` knows, so that ∇W can stay as factors."""
    change = None if bias is None else bias.d if isinstance(bias, Pair) else torch.zeros_like(bias)
    a, b = (F.linear(at(x, side), at(weight, side), at(bias, side)) for side in "ab")
    if not isinstance(x, Pair):
        return Pair(a, b, F.linear(x, weight.d, change))
    return Pair(a, b, F.linear(x.mid, weight.d, change) + F.linear(x.d, weight.mid))


RULES[F.linear] = linear


@rule("addmm addmv")
def added(op: Any, bias: Any, x: Any, y: Any, beta: float = 1, alpha: float = 1) -> Pair:
    if isinstance(x, Pair) or isinstance(y, Pair):
        whole = product(torch.matmul, x, y)
    else:
        assert isinstance(bias, Pair)
        return bias * beta + torch.matmul(x, y) * alpha
    whole = whole * alpha if alpha != 1 else whole
    return whole + (bias * beta if beta != 1 else bias)


@rule("div")
def div(op: Any, x: Any, y: Any) -> Pair:
    if isinstance(x, Pair):
        return x / y
    return y.reciprocal() * x


@rule("convolution")
def convolution(op: Any, x: Any, weight: Any, bias: Any, *geometry: Any) -> Pair:
    whole = product(lambda u, w: op(u, w, None, *geometry), x, weight) if isinstance(x, Pair) or isinstance(weight, Pair) else None
    if bias is None:
        assert whole is not None
        return whole
    dims = len(geometry[0])
    shaped = bias.reshape(-1, *[1] * dims)
    return shaped + op(x, weight, None, *geometry) if whole is None else whole + shaped
