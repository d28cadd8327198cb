"""Elementwise functions: δf(x) = (f(b) − f(a)) / (b − a) · δx."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from explaind.kernel.secant.pair import Pair
from explaind.kernel.secant.rules import rule
from explaind.kernel.secant.selecting import maximum, minimum
from explaind.kernel.secant.slopes import ramp, share, smooth


@rule("expm1 erf erfc tanh sigmoid gelu silu mish sin cos atan sinh cosh asinh")
def curve(op: Any, x: Pair, *args: Any, **kwargs: Any) -> Pair:
    f = partial(_called, op, args, kwargs)
    return x.elementwise(f, smooth(f, x.a, x.b))


def _called(op: Any, args: Any, kwargs: Any, x: Tensor) -> Tensor:
    value: Tensor = op(x, *args, **kwargs)
    return value


@rule("softplus")
def softplus(op: Any, x: Pair, beta: float = 1, threshold: float = 20) -> Pair:
    """log(1 + exp(β x)) / β, and x itself where β x is above the threshold: there it jumps, by exp(−threshold) / β."""
    f = partial(_called, op, (beta, threshold), {})
    jumps = math.exp(-threshold) > torch.finfo(x.a.dtype).eps * threshold
    return x.elementwise(f, smooth(f, x.a, x.b, kinks=(threshold / beta,) if jumps else (), scale=1 / abs(beta)))


@rule("elu")
def elu(op: Any, x: Pair, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Pair:
    return _kinked(op, x, (alpha, scale, input_scale), 1 / abs(input_scale) if input_scale else 1.0)


@rule("celu")
def celu(op: Any, x: Pair, alpha: float = 1) -> Pair:
    return _kinked(op, x, (alpha,), abs(alpha))


def _kinked(op: Any, x: Pair, args: Any, scale: float) -> Pair:
    f = partial(_called, op, args, {})
    return x.elementwise(f, smooth(f, x.a, x.b, kinks=(0.0,), scale=scale))


@rule("hardswish")
def hardswish(op: Any, x: Pair) -> Pair:
    return x.elementwise(op, smooth(op, x.a, x.b, kinks=(-3.0, 3.0)))


@rule("exp")
def exp(op: Any, x: Pair) -> Pair:
    return x.exp()


@rule("log")
def log(op: Any, x: Pair) -> Pair:
    return x.log()


@rule("log1p")
def log1p(op: Any, x: Pair) -> Pair:
    return (x + 1.0).log()


@rule("log2")
def log2(op: Any, x: Pair) -> Pair:
    return x.log() * (1.0 / torch.log(torch.tensor(2.0, dtype=torch.float64)).item())


@rule("sqrt")
def sqrt(op: Any, x: Pair) -> Pair:
    return x.sqrt()


@rule("rsqrt")
def rsqrt(op: Any, x: Pair) -> Pair:
    return x.rsqrt()


@rule("reciprocal")
def reciprocal(op: Any, x: Pair) -> Pair:
    return x.reciprocal()


@rule("pow")
def power(op: Any, x: Any, exponent: Any) -> Pair:
    if isinstance(exponent, Pair):  # c ** x, or x ** y
        base = x if isinstance(x, Pair) else torch.as_tensor(x, dtype=exponent.a.dtype, device=exponent.a.device)
        return (exponent * base.log()).exp()
    known = {1: lambda: x, 2: x.square, 0.5: x.sqrt, -0.5: x.rsqrt, -1: x.reciprocal, 3: lambda: x.square() * x}
    if not isinstance(exponent, Tensor) and exponent in known:
        pair: Pair = known[exponent]()
        return pair
    f = partial(_called, op, (exponent,), {})
    scale = torch.minimum(x.a.abs(), x.b.abs()) / (abs(exponent) + 5)  # the seventh derivative grows like ((|n| + 5) / x)⁶ f′
    return x.elementwise(f, smooth(f, x.a, x.b, kinks=(0.0,), scale=scale))


@rule("relu")
def relu(op: Any, x: Pair) -> Pair:
    a, b = x.a.relu(), x.b.relu()
    return Pair(a, b, share(x.a, x.b, b - a) * x.d)


@rule("leaky_relu")
def leaky_relu(op: Any, x: Pair, negative_slope: float = 0.01) -> Pair:
    above = ramp(x.a, x.b)
    return x.elementwise(lambda t: op(t, negative_slope), above + negative_slope * (1.0 - above))


@rule("abs")
def absolute(op: Any, x: Pair) -> Pair:
    return x.elementwise(torch.abs, 2.0 * ramp(x.a, x.b) - 1.0)


@rule("clamp clamp_min clamp_max hardtanh")
def clamp(op: Any, x: Any, low: Any = None, high: Any = None) -> Pair:
    if op is torch.ops.aten.clamp_max.default:
        low, high = None, low
    if op is torch.ops.aten.hardtanh.default:
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    if isinstance(low, (Tensor, Pair)) or isinstance(high, (Tensor, Pair)):
        above = x if low is None else maximum(op, x, low)
        return above if high is None else minimum(op, above, high)
    if low is not None and high is not None and low > high:  # the upper one is the later one
        low = high
    slope = torch.ones_like(x.a) if low is None else ramp(x.a, x.b, low)
    if high is not None:
        slope = slope - ramp(x.a, x.b, high)
    return x.elementwise(lambda t: t.clamp(low, high), slope)


@rule("hardsigmoid")
def hardsigmoid(op: Any, x: Pair) -> Pair:
    return x.elementwise(op, (ramp(x.a, x.b, -3.0) - ramp(x.a, x.b, 3.0)) / 6.0)
