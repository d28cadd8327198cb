"""Choices between two values, by a mask or by a comparison that the parameters move.

A comparison is a step function of the difference that it looks at, and has that function's slope: 1 (or −1) over the change of the
difference where it turns over on the way, otherwise 0. With the mask m as a number, the choice m x + (1 − m) y is a product.
"""

from typing import Any

import torch
from torch import Tensor

from explaind.kernel.secant.pair import Pair, at
from explaind.kernel.secant.rules import refuse, rule
from explaind.kernel.secant.slopes import difference, quotient

aten = torch.ops.aten


@rule("gt lt ge le eq ne")
def compare(op: Any, x: Any, y: Any) -> Pair:
    """1 where it holds, otherwise 0."""
    gap = x - y if isinstance(x, Pair) else -(y - x)
    a, b = (op(at(x, side), at(y, side)).to(gap.a.dtype) for side in "ab")
    return Pair(a, b, quotient(b - a, difference(gap.a, gap.b), torch.zeros_like(a)) * gap.d)


@rule("logical_not bitwise_not")
def opposite(op: Any, x: Pair) -> Pair:
    return -x + 1.0


@rule("logical_and bitwise_and")
def both(op: Any, x: Any, y: Any) -> Pair:
    pair: Pair = x * _number(y) if isinstance(x, Pair) else y * _number(x)
    return pair


@rule("logical_or bitwise_or")
def either(op: Any, x: Any, y: Any) -> Pair:
    x, y = _number(x), _number(y)
    pair: Pair = -both(op, -x + 1.0, -y + 1.0) + 1.0
    return pair


def _number(mask: Any) -> Any:
    return mask.to(torch.get_default_dtype()) if isinstance(mask, Tensor) else mask


@rule("where")
def where(op: Any, condition: Any, x: Any, y: Any) -> Pair:
    moving = isinstance(condition, Pair)
    if moving and (_infinite(x) or _infinite(y)):
        raise refuse(op, "its condition moves, and one of its values is infinite")
    masks = [(at(condition, side) != 0) if moving else condition for side in "ab"]
    a, b = (torch.where(mask, at(x, side), at(y, side)) for mask, side in zip(masks, "ab", strict=True))
    of_x, of_y = (v.d if isinstance(v, Pair) else a.new_zeros(()) for v in (x, y))
    d = torch.where(masks[0], of_x, of_y).expand(a.shape)
    if moving:
        # Elsewhere a value that is not chosen may be infinite.
        turned = masks[0] != masks[1]
        middles = (torch.where(turned, v.mid if isinstance(v, Pair) else v, 0.0) for v in (x, y))
        d = torch.where(turned, 0.5 * (of_x + of_y) + difference(*reversed(list(middles))) * condition.d, d)
    return Pair(a, b, d)


def _infinite(value: Any) -> bool:
    """Whether a choice is a constant infinity, to or from which nothing finite leads."""
    if isinstance(value, Pair) or at(value, "a").ndim:
        return False
    try:
        return bool(value.isinf())
    except RuntimeError:  # of the batch, under vmap: no constant
        return False
