"""What a machine does per second, measured in a fraction of one, and the time that a piece of work should take on it.

Rates are rounded to powers of two: estimates need no more, and what is chosen by them is then mostly the same whenever it is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import log2
from time import perf_counter

import torch

SIDE = 384
"""Of the matrices that are multiplied: large enough for a full rate, small enough for milliseconds."""
COPIED = 1 << 22
"""Numbers that are copied: more than fit into a cache."""
TRIES = 5


@dataclass(frozen=True)
class Machine:
    """Rates of one device for one dtype."""

    flops: float
    """Of a large matrix product, per second."""
    traffic: float
    """Bytes read or written per second."""
    call: float
    """Seconds that an operation takes beside its work."""

    def seconds(self, flops: float = 0.0, traffic: float = 0.0, calls: float = 0.0) -> float:
        """Time for so many operations and so many bytes of main memory."""
        return flops / self.flops + traffic / self.traffic + calls * self.call


ORDINARY = Machine(2.0**37, 2.0**33, 2.0**-19)
"""Of a machine that nobody measured."""


def timed(work: Callable[[], object], device: torch.device, tries: int = TRIES) -> float:
    """Seconds that something takes: the fastest of some tries, after one that warms up."""

    def once() -> float:
        start = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter() - start

    once()
    return min(once() for _ in range(tries))


@cache
def machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The rates of a device, measured on the first call of a process."""
    square, small = torch.ones(SIDE, SIDE, dtype=dtype, device=device), torch.ones(8, dtype=dtype, device=device)
    long = torch.ones(COPIED, dtype=dtype, device=device)
    other, result = torch.empty_like(long), torch.empty_like(square)
    product = timed(lambda: torch.mm(square, square, out=result), device)
    copy = timed(lambda: other.copy_(long), device)
    call = timed(lambda: small.add_(1.0), device)
    return Machine(*(2.0 ** round(log2(rate)) for rate in (2 * SIDE**3 / product, 2 * COPIED * long.element_size() / copy, call)))
