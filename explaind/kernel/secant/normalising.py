"""Softmax and its logarithm; the norms, composed of sums, products and elementwise functions of pairs.

With p the softmax at either end, lp its logarithm and L = (p_b − p_a) / (lp_b − lp_a), the logarithmic mean of p_a and p_b, L δlp
sums to δ Σp = 0, and lp = x − logsumexp(x). Hence, exactly,

    δ logsumexp = Σ_k w_k δx_k,        w = L / ΣL,        δlp = δx − δ logsumexp,        δp = L δlp

(the weights of the Sato–Vartia index). They sum to 1, so that moving all x alike moves nothing, and none is larger than 1.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from explaind.kernel.secant.elementwise import absolute
from explaind.kernel.secant.pair import Dims, Pair, at
from explaind.kernel.secant.rules import refuse, rule
from explaind.kernel.secant.selecting import amax, amin
from explaind.kernel.secant.slopes import quotient, smooth


def _shares(x: Pair, dim: Dims) -> tuple[Tensor, Tensor]:
    """L and δ logsumexp, with the dimensions kept."""
    a, b = (_log_shares(end, dim) for end in (x.a, x.b))
    means = smooth(torch.exp, a, b)
    whole = means.sum(dim, keepdim=True)
    return means, (quotient(means, whole.expand_as(means), torch.zeros_like(means)) * x.d).sum(dim, keepdim=True)


def _log_shares(x: Tensor, dim: Dims) -> Tensor:
    """log-softmax over one or more dimensions; −inf throughout where a row is masked everywhere, for which torch has nan."""
    shares = x - x.logsumexp(dim, keepdim=True)
    return torch.where(shares.isnan(), -torch.inf, shares)


@rule("_softmax _safe_softmax")
def softmax(op: Any, x: Pair, dim: int, *_: Any, **__: Any) -> Pair:
    means, whole = _shares(x, dim)
    return Pair(x.a.softmax(dim), x.b.softmax(dim), means * (x.d - whole))


@rule("_log_softmax")
def log_softmax(op: Any, x: Pair, dim: int, *_: Any, **__: Any) -> Pair:
    return Pair(x.a.log_softmax(dim), x.b.log_softmax(dim), x.d - _shares(x, dim)[1])


@rule("logsumexp")
def logsumexp(op: Any, x: Pair, dim: Any, keepdim: bool = False) -> Pair:
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    whole = _shares(x, dims)[1]
    return Pair(x.a.logsumexp(dims, keepdim), x.b.logsumexp(dims, keepdim), whole if keepdim else whole.squeeze(dims))


def _standardised(x: Any, dims: Dims, eps: float) -> Any:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _scaled(x: Any, weight: Any, bias: Any, shape: tuple[int, ...] | None = None) -> Any:
    """Here and in the norms x may be a constant: the input of the model, whose norm has parameters."""
    weight, bias = (v if v is None or shape is None else v.reshape(*shape) for v in (weight, bias))
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


@rule("native_layer_norm")
def layer_norm(op: Any, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    return _scaled(_standardised(x, tuple(range(-len(shape), 0)), eps), weight, bias), None, None


@rule("native_group_norm")
def group_norm(op: Any, x: Any, weight: Any, bias: Any, n: int, c: int, hw: int, groups: int, eps: float) -> Any:
    dims = at(x, "a").shape
    whole = _standardised(x.reshape(n, groups, -1), -1, eps).reshape(*dims)
    return _scaled(whole, weight, bias, _by_channel(dims)), None, None


def _by_channel(dims: Sequence[int]) -> tuple[int, ...]:
    """The shape in which one number a channel, the second dimension, stands beside values of shape dims."""
    return -1, *[1] * (len(dims) - 2)


@rule("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm")
def batch_norm(op: Any, x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
    dims, eps = at(x, "a").shape, rest[-1]
    shape = _by_channel(dims)
    if op is torch.ops.aten._native_batch_norm_legit.no_stats or rest[0] is None:  # instance norm arrives as this
        return _scaled(_standardised(x, (0, *range(2, len(dims))), eps), weight, bias, shape), None, None
    if op is not torch.ops.aten._native_batch_norm_legit_no_training.default and rest[2]:
        raise refuse(op, "a norm in train mode moves its running statistics")
    mean, var = rest[:2]
    return _scaled((x - mean.reshape(shape)) * (var + eps).rsqrt().reshape(shape), weight, bias, shape), None, None


@rule("var")
def var(op: Any, x: Pair, dim: Any = None, correction: float = 1, keepdim: bool = False) -> Pair:
    dims = tuple(range(x.a.ndim)) if dim is None else tuple(dim)
    count = 1
    for d in dims:
        count *= x.a.shape[d]
    squares = (x - x.mean(dims, keepdim=True)).square()
    return squares.sum(dims, keepdim) * (1.0 / (count - correction))


@rule("var_mean")
def var_mean(op: Any, x: Pair, dim: Any = None, correction: float = 1, keepdim: bool = False) -> Any:
    dims = tuple(range(x.a.ndim)) if dim is None else tuple(dim)
    return var(op, x, dims, correction, keepdim), x.mean(dims, keepdim)


@rule("linalg_vector_norm")
def vector_norm(op: Any, x: Pair, order: float = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Pair:
    dims = tuple(range(x.a.ndim)) if dim is None else tuple(dim)
    if order == 2:
        return x.square().sum(dims, keepdim).sqrt()
    if order not in ORDERS:
        raise refuse(op, f"a norm of order {order} has no secant rule")
    return ORDERS[order](absolute(op, x), dims, keepdim)


ORDERS: dict[float, Callable[[Pair, Dims, bool], Pair]] = {
    1: Pair.sum,
    math.inf: partial(amax, None),
    -math.inf: partial(amin, None),
}
"""Norms of other orders than 2, of the magnitudes."""
