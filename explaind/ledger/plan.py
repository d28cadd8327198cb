"""What a decomposition will make, known before any work: the axes with their sizes, whether the result fits, blocks of queries."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind.errors import RequestError
from explaind.kernel.gradients import take
from explaind.kernel.layout import Layout
from explaind.kernel.measures import Measures
from explaind.kernel.resolution import Resolution, check_budget, resolution
from explaind.ledger.ledger import ordered
from explaind.replay.batches import count
from explaind.replay.functional import Functional
from explaind.store.reader import Run

WORK_BYTES = 2 << 30
"""Memory for costates and gradients of one block of queries; more queries are swept block by block."""


@dataclass(frozen=True)
class Plan:
    """Axes and sizes of the result."""

    wanted: Resolution
    sizes: dict[str, int]
    coords: dict[str, np.ndarray]
    measure_axes: tuple[str, ...]
    itemsize: int

    @property
    def examples(self) -> int:
        """Length of the example axis: 1 where it is summed."""
        return self.sizes["example"] if "example" in self.wanted.keep else 1


def planned(
    run: Run, layout: Layout, shape: tuple[int, ...], keep: Collection[str] | None, view: str, windows: int, dtype: torch.dtype, budget: int
) -> Plan:
    """Check the axes that were asked for against the measure's shape and the budget; RequestError in one line."""
    axes = (*("query", "output")[: len(shape)], "example", "layer") if keep is None else keep
    wanted = resolution(axes, run.steps, view, windows)
    if len(shape) < 2 and "output" in wanted.keep:
        raise RequestError(
            "keep holds 'output', but the measure gives one number per query",
            expected="Tensor[query, output]",
            got=f"shape {shape}",
            do="drop 'output' from keep",
        )
    coords = {
        "query": np.arange(shape[0]),
        "output": np.arange(shape[1]) if len(shape) == 2 else np.arange(1),
        "example": run.examples,
        "layer": np.array(layout.names),
        "param": np.arange(layout.params),
        "step": np.arange(0, max(1, wanted.steps), wanted.windows),
    }
    sizes = {axis: len(values) for axis, values in coords.items()}
    check_budget(ordered(wanted.keep), sizes, dtype.itemsize, budget)
    measure_axes = tuple(axis for axis in ("query", "output")[: len(shape)] if axis in wanted.keep)
    return Plan(wanted, sizes, {a: coords[a] for a in ordered(wanted.keep)}, measure_axes, dtype.itemsize)


def probed(asking: Functional, layout: Layout, theta: Tensor, batch: Any) -> tuple[int, ...]:
    """Shape of the measure on these queries; RequestError when it is none."""
    count(batch)
    with torch.no_grad():
        values = asking(layout.split(theta), batch)
    if not isinstance(values, Tensor) or values.ndim not in (1, 2):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise RequestError(
            "a measure must give one number per query, or per query and output",
            expected="Tensor[query] or Tensor[query, output]",
            got=got,
            do="change the measure",
        )
    return tuple(values.shape)


def blocks(plan: Plan, layout: Layout, asking: Functional, batch: Any, theta: Tensor) -> Iterator[Any]:
    """The queries in blocks whose costates fit in WORK_BYTES; one block where queries are summed or depend on each other."""
    if "query" not in plan.wanted.keep or not Measures(asking, batch, layout, plan.wanted.keep, theta).by_query:
        yield batch
        return
    per_query = plan.sizes["output"] if "output" in plan.wanted.keep else 1
    fine = {"none": 1, "layer": len(layout.names), "param": 1}[plan.wanted.finest]
    working = per_query * plan.itemsize * (6 * layout.params + (fine * plan.sizes["example"] if "example" in plan.wanted.keep else 0))
    rows = max(1, WORK_BYTES // working)
    parts = -(-plan.sizes["query"] // rows)
    rows = -(-plan.sizes["query"] // parts)  # blocks of even size
    for start in range(0, plan.sizes["query"], rows):
        yield take(batch, slice(start, min(start + rows, plan.sizes["query"])))
