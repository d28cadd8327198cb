"""Elementwise functions: δf(x) = (f(b) − f(a)) / (b − a) · δx."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from explaind.kernel.secant.pair import Pair
from explaind.kernel.secant.rules import refuse, rule
from explaind.kernel.secant.slopes import ramp, share, smooth


@rule("expm1 erf erfc tanh sigmoid gelu silu softplus mish sin cos atan sinh cosh asinh log_sigmoid")
def curve(op: Any, x: Pair, *args: Any, **kwargs: Any) -> Pair:
    f = partial(_called, op, args, kwargs)
    return x.elementwise(f, smooth(f, x.a, x.b))


def _called(op: Any, args: Any, kwargs: Any, x: Tensor) -> Tensor:
    value: Tensor = op(x, *args, **kwargs)
    return value


@rule("elu celu selu")
def kinked(op: Any, x: Pair, *args: Any, **kwargs: Any) -> Pair:
    f = partial(_called, op, args, kwargs)
    return x.elementwise(f, smooth(f, x.a, x.b, kinks=(0.0,)))


@rule("hardswish")
def hardswish(op: Any, x: Pair) -> Pair:
    return x.elementwise(op, smooth(op, x.a, x.b, kinks=(-3.0, 3.0)))


@rule("log_sigmoid_forward")
def log_sigmoid(op: Any, x: Pair) -> Any:
    return curve(torch.ops.aten.log_sigmoid.default, x), None


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


@rule("square")
def square(op: Any, x: Pair) -> Pair:
    return x.square()


@rule("pow")
def power(op: Any, x: Any, exponent: Any) -> Pair:
    if isinstance(exponent, Pair):  # c ** x
        return (exponent * torch.as_tensor(x, dtype=exponent.a.dtype).log().item()).exp()
    known = {1: lambda: x, 2: x.square, 0.5: x.sqrt, -0.5: x.rsqrt, -1: x.reciprocal, 3: lambda: x.square() * x}
    if not isinstance(exponent, Tensor) and exponent in known:
        pair: Pair = known[exponent]()
        return pair
    f = partial(_called, op, (exponent,), {})
    return x.elementwise(f, smooth(f, x.a, x.b, kinks=(0.0,), relative=True))


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
def clamp(op: Any, x: Pair, low: Any = None, high: Any = None) -> Pair:
    if op is torch.ops.aten.clamp_max.default:
        low, high = None, low
    if op is torch.ops.aten.hardtanh.default:
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    if isinstance(low, (Tensor, Pair)) or isinstance(high, (Tensor, Pair)):
        raise refuse(op, "its bounds are tensors")
    slope = torch.ones_like(x.a) if low is None else ramp(x.a, x.b, low)
    if high is not None:
        slope = slope - ramp(x.a, x.b, high)
    return x.elementwise(lambda t: t.clamp(low, high), slope)


@rule("hardsigmoid")
def hardsigmoid(op: Any, x: Pair) -> Pair:
    return x.elementwise(op, (ramp(x.a, x.b, -3.0) - ramp(x.a, x.b, 3.0)) / 6.0)
