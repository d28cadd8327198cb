"""Which arrays a run has, as its manifest says: what the writer creates, and what a file that claims to hold a run is held against."""

from math import prod

import numpy as np

from explaind.rules.gradient_filter import gradient_filter
from explaind.store.bitdelta import CELLS
from explaind.store.manifest import Manifest
from explaind.store.schema import CHUNK_BYTES, CHUNK_SLOTS, CHUNK_VALUES, Column

TOGETHER = 32
"""Examples whose gradients stand in one chunk at least; in a small model there are more."""
SMALL_CHUNK = 1 << 18
"""Numbers in such a chunk, which is filled up where a step has fewer examples."""

OWN, LEAST, MANY = 35 << 11, 1 << 13, 1 << 17
"""Numbers that half of what a recorder holds besides a tile would be; numbers of a tile at least; parameters of a model that has many."""
TILE, NARROW = 1 << 12, 4
"""Columns of a tile where the parameters are few, and rows that there is room for in any."""

OPTIONAL = ("momentum", "preconditioner")
"""Columns that only some optimizers have, which the manifest does not tell."""


def columns(m: Manifest, codec: str = "standard") -> dict[str, Column]:
    """The growing arrays that a run has, or may have, by name; codec: of theta, momentum and the preconditioner."""
    d, layers = m.params, len(m.layers)
    options, scalars = max(len(o.options) for o in m.optimizers), max(len(o.scalars) for o in m.optimizers)
    found = [
        Column("theta", ("state", "param"), m.dtype, (d,), codec=codec, tile=tile(d, m.span)),
        Column("batch", ("step", "slot"), "int64", (1,), -1, CHUNK_SLOTS, "short"),
        Column("part", ("step", "slot"), "int32", (1,), -1, CHUNK_SLOTS, "short"),
        Column("weight", ("step", "slot"), "float64", (1,), 0, CHUNK_SLOTS, "short"),
        Column("hyper", ("step", "layer", "option"), "float64", (layers, options), np.nan),
        Column("age", ("step", "layer"), "int32", (layers,)),
        Column("mode", ("step",), "int32", ()),
        Column("gap", ("step",), "int64", ()),
        Column("precision", ("step",), "float64", ()),
        Column("checksum_theta", ("state", "layer"), "uint32", (layers,)),
        Column("checksum_step", ("step",), "uint32", ()),
    ]
    found += [Column("scalar", ("step", "layer", "scalar"), "float64", (layers, scalars))] if scalars else []
    found += [Column("consumed", ("step", "layer", "size"), "float64", (layers, 2), np.nan)]
    found += [Column("random", ("step", "byte"), "uint8", (1,), 0, CHUNK_BYTES)]
    found += [Column("preconditioner", ("step", "param"), m.dtype, (d,), codec=codec, tile=tile(d, m.span))]
    found += [Column("momentum", ("anchor", "param"), m.dtype, (d,), codec=codec, tile=tile(d, m.together))]
    if m.gradient_filter is not None:
        found += [Column("filtered", ("anchor", "entry"), m.dtype, (gradient_filter(m.gradient_filter).slots * d,))]
    if m.thin is not None:
        # States that are far apart have little in common that another codec would make use of.
        found[0] = Column("theta", ("stored", "param"), m.dtype, (d,), codec="apart")
        wide = max(CHUNK_SLOTS, min(d, CHUNK_VALUES))  # how wide the state is, is not known before there is one
        found += [Column("state", ("anchor", "word"), "uint32", (1,), 0, wide, "apart")]
        found += [Column("groups", ("step", "character"), "uint8", (1,), 0, CHUNK_SLOTS)]
    if m.gradients is not None:
        slots = min(CHUNK_SLOTS, max(TOGETHER, SMALL_CHUNK // max(1, d)))
        found += [Column("gradient", ("step", "slot", "param"), m.gradients, (1, d), 0, slots, "quick")]
        found += [Column("checksum_gradient", ("step",), "uint32", ())]
    return {column.name: column for column in found}


def tile(params: int, rows: int) -> int:
    """How many columns of a chunk are packed at a time. Large tiles are packed sooner, and into less; of a number in one two are held.

    All that a recorder holds is to be less than two copies of the parameters, or three megabytes where there are many: they are no matter
    then, and a training with short steps would wait for small tiles. Nor are they where there are few.
    """
    if params < OWN + LEAST:
        return TILE
    numbers = params - OWN if params < MANY else max(params - OWN, MANY)
    return max(1, min(CELLS, numbers) // max(rows, NARROW))


def rows_of_chunk(column: Column, m: Manifest) -> int:
    """How many rows a chunk holds: a span of steps, or the anchors of one; gradients, and the states of a thin run, stand alone."""
    return 1 if column.name == "gradient" else {"stored": 1, "anchor": m.together}.get(column.dims[0], m.span)


def bytes_at_once(column: Column, m: Manifest) -> int:
    """What is read of it together: a row of chunks."""
    return rows_of_chunk(column, m) * prod(column.shape) * np.dtype(column.dtype).itemsize


def rows(column: Column, steps: int, anchors: int) -> int:
    """How many rows so many committed steps come with."""
    return {"state": steps + 1, "anchor": anchors, "stored": anchors + 1}.get(column.dims[0], steps)


def starts(gaps: np.ndarray, block: int) -> tuple[int, ...]:
    """Steps before which there is an anchor, ascending: the first of every block, and the one behind every gap; gaps: int64 [step]."""
    behind = (np.flatnonzero(gaps) + 1).tolist()
    return tuple(sorted({*range(0, len(gaps), block), *(step for step in behind if step < len(gaps))}))
