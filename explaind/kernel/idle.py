"""Neurons that some rows of a never went through: which rows and columns of their matrices are in use."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

FULL = 0.9
"""Matrices with more of their numbers than this in use are multiplied whole: picking would cost as much."""
TOGETHER = 32
"""Rows of a that leave the same out are multiplied apart from others where there are so many of them on average."""
FORMING = 32
"""Rows of a with which a gradient is multiplied in the time that it takes to form it."""
BLOCK = 16
"""Rows of a that are looked at together, which a cache holds."""
SAMPLE = 8
"""Rows of a that are looked at first: where these leave nothing out, nobody looks at the others."""


@dataclass(frozen=True)
class Used:
    """Rows of a, and the rows and columns of their matrices that are not all zero: which, or whether each is."""

    rows: slice
    outs: Tensor
    ins: Tensor

    @property
    def numbers(self) -> int:
        """Of these rows, of whether."""
        return (self.rows.stop - self.rows.start) * self._size

    @property
    def cost(self) -> int:
        """Of multiplying them with gradients that are formed first."""
        return self.numbers + FORMING * self._size

    @property
    def _size(self) -> int:
        return int(self.outs.sum()) * int(self.ins.sum())

    def joined(self, other: "Used") -> "Used":
        """With the rows that follow."""
        return Used(slice(self.rows.start, other.rows.stop), self.outs | other.outs, self.ins | other.ins)


def used(a: Float[Tensor, "row out in"]) -> list[Used]:
    """Runs of rows that leave the same outs and ins out; nothing where that would not pay."""
    some = a[:: max(1, len(a) // SAMPLE)]
    if some.any(2).all() and some.any(1).all():
        return []
    outs, ins = (torch.cat(found) for found in zip(*((_any(block, 2), _any(block, 1)) for block in a.split(BLOCK)), strict=True))
    same = torch.cat([outs, ins], 1)
    starts = [0, *((same[1:] != same[:-1]).any(1).nonzero()[:, 0] + 1).tolist(), len(a)]
    if len(starts) - 1 > max(1, len(a) // TOGETHER):
        starts = [0, len(a)]
    found = list[Used]()
    for i, j in pairwise(starts):
        run = Used(slice(i, j), outs[i:j].any(0), ins[i:j].any(0))
        while found and (both := found[-1].joined(run)).cost <= found[-1].cost + run.cost:
            found, run = found[:-1], both
        found.append(run)
    if sum(u.numbers for u in found) >= FULL * a.numel():
        return []
    return [Used(u.rows, u.outs.nonzero()[:, 0], u.ins.nonzero()[:, 0]) for u in found]


def _any(a: Tensor, dim: int) -> Tensor:
    """``a.any(dim)`` of numbers, seven times as fast on a CPU."""
    return (a.amax(dim) != 0) | (a.amin(dim) != 0)
