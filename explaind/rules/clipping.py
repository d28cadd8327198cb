"""Clipping by norm, by value and by both, in either order: all make clamp(c G, ±m) of a gradient G, with 0 <= c <= 1."""

import torch
from torch import Tensor


def scale(gradient: Tensor, norm: Tensor, most: Tensor) -> Tensor:
    """c with ‖clamp(c G, ±most)‖ = norm; 1 where there is none below.

    In s = c² the square of that norm is Σ min(s g², most²), increasing and concave in straight pieces: Newton's steps from below stay
    below, and are at the root when they reach its piece.
    """
    squares, wanted, limit = gradient.square(), norm.square(), most.square()
    if squares.clamp(max=limit).sum() <= wanted:
        return squares.new_ones(())
    s, uncut = wanted / squares.sum(), torch.ones_like(squares, dtype=torch.bool)
    while (cut := uncut & (s * squares > limit)).any():
        uncut &= ~cut
        s = ((wanted - limit * (~uncut).sum()) / squares[uncut].sum()).clamp(0.0, 1.0)
    return s.sqrt()
