"""What a decomposition will make, known before any work: the axes with their sizes, whether the result fits, blocks of queries."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind.errors import RequestError
from explaind.kernel.gradients import CHUNK_BYTES
from explaind.kernel.groups import Asked, Grouping, check_groups, grouping
from explaind.kernel.layout import Layout
from explaind.kernel.measures import Measures
from explaind.kernel.resolution import Resolution, check_budget, resolution, words
from explaind.ledger.ledger import ordered
from explaind.replay.batches import count
from explaind.replay.functional import Functional
from explaind.store.reader import Run

WORK_BYTES = 2 << 30
"""Memory for costates and gradients of one block of queries, unless told otherwise; more queries are swept block by block."""
CHUNK_SHARE = 8
"""At most one part in so many of it is for the example gradients that are built at once."""


@dataclass(frozen=True)
class Shard:
    """Every so many-th block of queries, for one of several processes."""

    index: int
    of: int

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    def owns(self, block: int) -> bool:
        """Whether a block is this shard's."""
        return block % self.of == self.index


def shard_named(text: str | None) -> Shard:
    """I/N; None is all there is. RequestError where it is no shard."""
    index, _, of = ("0/1" if text is None else text).partition("/")
    if not (index.isdecimal() and of.isdecimal() and int(index) < int(of)):
        raise RequestError(
            "unknown shard", expected="I/N with 0 <= I < N, such as 0/4", got=repr(text), do="number the processes from 0 to N − 1"
        )
    return Shard(int(index), int(of))


@dataclass(frozen=True)
class Plan:
    """Axes and sizes of the result."""

    wanted: Resolution
    sizes: dict[str, int]
    coords: dict[str, np.ndarray]
    measure_axes: tuple[str, ...]
    itemsize: int
    groups: Mapping[str, Grouping]
    """Of the axes whose members are summed in groups."""

    def of_queries(self, queries: np.ndarray) -> "Plan":
        """The plan for some of the queries."""
        names = self.coords["query"][queries]
        return replace(self, sizes={**self.sizes, "query": len(queries)}, coords={**self.coords, "query": names})


def planned(
    run: Run,
    layout: Layout,
    shape: tuple[int, ...],
    keep: Collection[str] | None,
    groups: Mapping[str, Asked],
    view: str,
    windows: int,
    dtype: torch.dtype,
    budget: int,
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
    check_groups(groups, wanted.keep)
    coords = {
        "query": np.arange(shape[0]),
        "output": np.arange(shape[1]) if len(shape) == 2 else np.arange(1),
        "example": run.examples,
        "layer": np.array(layout.names),
        "param": np.arange(layout.params),
        "step": run.numbers[: max(1, wanted.steps) : wanted.windows],
    }
    grouped = {axis: grouping(axis, asked, coords[axis].tolist()) for axis, asked in groups.items()}
    coords |= {axis: np.array(found.names) for axis, found in grouped.items()}
    sizes = {axis: len(values) for axis, values in coords.items()}
    check_budget(ordered(wanted.keep), sizes, dtype.itemsize, budget)
    measure_axes = tuple(axis for axis in ("query", "output")[: len(shape)] if axis in wanted.keep)
    return Plan(wanted, sizes, {a: coords[a] for a in ordered(wanted.keep)}, measure_axes, dtype.itemsize, grouped)


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


def work_bytes(memory: int | None) -> int:
    """Bytes to work in, where None leaves that open."""
    return WORK_BYTES if memory is None else memory


def chunk_bytes(memory: int | None) -> int:
    """Bytes of example gradients that may be built at once."""
    return min(CHUNK_BYTES, work_bytes(memory) // CHUNK_SHARE)


def blocks(plan: Plan, layout: Layout, asking: Functional, batch: Any, theta: Tensor, memory: int | None, shard: Shard) -> list[slice]:
    """The queries in blocks of even size whose costates fit in memory, at least one a shard.

    There is one block alone where queries are summed or depend on each other. RequestError where the memory given is too small for the
    smallest block, or where there are fewer queries than shards.
    """
    queries = plan.sizes["query"]
    least = _least(plan, layout)
    apart = (
        "query" in plan.wanted.keep
        and "query" not in plan.groups
        and Measures(asking, batch, layout, plan.wanted.keep, theta, groups=plan.groups).by_query
    )
    if not apart and "query" in plan.wanted.keep:
        least *= queries
    if memory is not None and memory < least:
        raise RequestError(
            "the memory is too small to work in",
            where="one query" if apart else "queries that are summed or depend on each other",
            expected=f"at least {words(least)} ({least} bytes)",
            got=words(memory),
            do="raise memory, or keep fewer outputs or examples",
        )
    if shard.of > (queries if apart else 1):
        raise RequestError(
            "there are more shards than queries"
            if apart
            else "queries that are summed or depend on each other cannot be split into shards",
            expected=f"at most {queries} shards" if apart else "no shard",
            got=str(shard),
            do="ask for fewer shards" if apart else "decompose them in one process",
        )
    if not apart:
        return [slice(0, queries)]
    rows = max(1, work_bytes(memory) // least)
    parts = max(shard.of, -(-queries // rows))
    return [slice(i * queries // parts, (i + 1) * queries // parts) for i in range(parts)]


def _least(plan: Plan, layout: Layout) -> int:
    """Bytes for costates, their gradients and products of one query."""
    measures = plan.sizes["output"] if "output" in plan.wanted.keep else 1
    fine = {"none": 1, "layer": plan.sizes["layer"], "param": 1}[plan.wanted.finest]
    examples = fine * plan.sizes["example"] if "example" in plan.wanted.keep else 0
    return measures * plan.itemsize * (6 * layout.params + examples)
