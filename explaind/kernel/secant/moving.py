"""Linear operations, most of which only move numbers about: each is its own secant."""

from typing import Any

import torch
from torch import Tensor

from explaind.kernel.secant.pair import Pair, at
from explaind.kernel.secant.rules import refuse, rule

aten = torch.ops.aten


def _change(value: Any) -> Any:
    """Arguments of a linear operation for the change: constants that stand beside pairs in a list do not change."""
    if isinstance(value, Pair):
        return value.d
    if isinstance(value, (list, tuple)) and any(isinstance(v, Pair) for v in value):
        return [v.d if isinstance(v, Pair) else torch.zeros_like(v) for v in value]
    return value


@rule(
    "reshape view_copy permute permute_copy transpose expand squeeze unsqueeze slice slice_copy select select_copy alias clone detach cat",
    "_to_copy sum mean neg flip repeat gather index index_select diagonal unfold cumsum narrow_copy split_copy split_with_sizes",
    "unbind_copy avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_bilinear2d upsample_bicubic2d",
)
def linear(op: Any, *args: Any, **kwargs: Any) -> Any:
    a, b, d = (op(*(pick(v) for v in args), **kwargs) for pick in (lambda v: at(v, "a"), lambda v: at(v, "b"), _change))
    if not isinstance(a, Tensor):
        return tuple(Pair(*parts) for parts in zip(a, b, d, strict=True))
    if not a.is_floating_point():
        raise refuse(op, "it rounds to whole numbers")
    return Pair(a, b, d)


@rule("as_strided")
def as_strided(op: Any, *_: Any) -> Any:
    raise refuse(op, "what it reads depends on how its argument lies in memory")


@rule("embedding")
def embedding(op: Any, weight: Pair, index: Tensor, *_: Any) -> Pair:
    # padding_idx, scale_grad_by_freq and sparse only change torch's own backward pass
    return weight.linear(lambda t: torch.nn.functional.embedding(index, t))


@rule("add")
def add(op: Any, x: Any, y: Any, alpha: float = 1) -> Any:
    return _sum(x, y * alpha if alpha != 1 else y)


@rule("sub")
def sub(op: Any, x: Any, y: Any, alpha: float = 1) -> Any:
    return _sum(x, y * -alpha)


def _sum(x: Any, y: Any) -> Pair:
    pair: Pair = x + y if isinstance(x, Pair) else y + x
    return pair


@rule("constant_pad_nd")
def pad(op: Any, x: Pair, widths: Any, value: float = 0) -> Pair:
    return Pair(op(x.a, widths, value), op(x.b, widths, value), op(x.d, widths, 0.0))


@rule("select_scatter slice_scatter scatter scatter_add index_put diagonal_scatter masked_scatter")
def written(op: Any, into: Any, *args: Any, **kwargs: Any) -> Pair:
    """Writing values into a tensor, where both may be pairs: linear in the two together."""
    if kwargs.get("reduce"):
        raise refuse(op, f"it writes with reduce={kwargs['reduce']!r}")
    if not any(isinstance(v, Pair) for v in args):  # constants are written: they do not change
        args_d = [torch.zeros_like(v) if isinstance(v, Tensor) and v.is_floating_point() else v for v in args]
        if op is aten.scatter.value:
            args_d[2] = 0.0
    else:
        args_d = [_change(v) for v in args]
    still = into.d if isinstance(into, Pair) else torch.zeros_like(into)
    a, b = (op(at(into, side), *(at(v, side) for v in args), **kwargs) for side in "ab")
    return Pair(a, b, op(still, *args_d, **kwargs))


@rule("copy")
def copy(op: Any, into: Any, x: Pair, *_: Any) -> Pair:
    shape = at(into, "a").shape
    return x.linear(lambda t: t.expand(shape)) if isinstance(x, Pair) else into * 0.0 + x


@rule("native_dropout")
def dropout(op: Any, x: Pair, p: float, train: bool | None) -> Any:
    if train and p > 0:
        raise refuse(op, "dropout is on")
    return (x, None) if op is aten.native_dropout.default else x
