"""One block of queries from beginning to end: what is on disk is taken from there, what is begun goes on, and is saved on its way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from explaind.kernel.accounts import Accounts
from explaind.kernel.sweep import Sweep
from explaind.ledger.packing import packed, packed_snapshot, tensor, unpacked, unpacked_snapshot
from explaind.ledger.parts import Parts


@dataclass(frozen=True)
class Swept:
    """A finished block."""

    accounts: Accounts
    ends: Tensor
    """Its measures before the first step and after the last one: [2, measure]."""


class Tick(Protocol):
    """Told of steps that are done."""

    def __call__(self, steps: int = 1) -> None: ...


def swept(sweep: Callable[[], Sweep], steps: int, tick: Tick, parts: Parts | None, block: int, device: torch.device) -> Swept:
    """Sweep a block of a run with so many steps. `parts` None: with nothing on disk."""
    if parts is None:
        made = sweep()
        return Swept(made.run(tick), made.values[[0, -1]])
    found = read(parts, block, device)
    if found is not None:
        tick(steps)
        return found
    made = sweep()
    begun = parts.read_begun(block)
    if begun is not None:
        made.restore(unpacked_snapshot(begun, device))
        tick(steps - made.snapshot().done)

    def between() -> None:
        if parts.is_due():
            parts.write_begun(block, packed_snapshot(made.snapshot()))

    done = Swept(made.run(tick, between), made.values[[0, -1]])
    parts.write(block, {**packed(done.accounts), "ends": done.ends.cpu().numpy()})
    return done


def read(parts: Parts, block: int, device: torch.device) -> Swept | None:
    """A block from the working folder; None where it is not there yet."""
    arrays = parts.read(block)
    return None if arrays is None else Swept(unpacked(arrays, device), tensor(arrays["ends"], device))
