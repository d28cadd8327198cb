"""Checksums of what a step recorded, chained from step to step: a row that is changed, removed or moved breaks the chain."""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from explaind.store.manifest import Layer
from explaind.store.row import Pieces, StepRow, Vector


@dataclass(slots=True)
class Chain:
    """How far the checksums of a run have come, before a step."""

    theta: np.ndarray
    """Of the parameters before it: uint32 [layer]."""
    step: int
    """Of all else that the step before it recorded; 0 before the first."""
    link: int = field(init=False)
    """crc32 of both: what was recorded behind other steps goes on from another link."""

    def __post_init__(self) -> None:
        self.link = zlib.crc32(self.theta.data, self.step)

    def behind(self, row: StepRow, mode: int, theta: np.ndarray, thin: bool) -> "Chain":
        """With one more step; theta: the checksum of the parameters that it led to, which continues this one."""
        return Chain(theta, step_checksum(row, mode, self.step, self.theta if thin else None))


def theta_checksum(theta: Vector, layers: Sequence[Layer], previous: np.ndarray) -> np.ndarray:
    """crc32 of each layer's bytes, continued from the previous state's: uint32 [layer]; pieces are a layer each."""
    whole = theta if isinstance(theta, Pieces) else np.ascontiguousarray(theta)
    parts = whole.views if isinstance(whole, Pieces) else [whole[a.offset : a.offset + a.size].data for a in layers]
    crcs = [zlib.crc32(part, crc) for part, crc in zip(parts, previous.tolist(), strict=True)]
    return np.array(crcs, dtype=np.uint32)


def step_checksum(row: StepRow, mode: int, previous: int, thin: np.ndarray | None = None) -> int:
    """crc32 of everything else that a step recorded, continued from the previous step's; thin: with theta's checksum before the step."""
    previous = zlib.crc32(mode.to_bytes(4, "little", signed=True), zlib.crc32(row.small, previous))
    gap = np.int64(row.gap) if row.gap else None
    precision = np.float64(row.precision) if row.precision else None
    for values in (
        row.preconditioner,
        row.anchor,
        row.scalars,
        row.consumed,
        row.random,
        row.filtered,
        gap,
        precision,
        row.state,
        row.groups,
        row.gradients_crc,
        thin,
    ):
        if values is not None:
            previous = crc32(values, previous)
    return previous


def text_checksum(value: Any) -> int:
    """crc32 of what JSON holds, whatever the order of its keys."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def constants_checksum(constants: Mapping[str, np.ndarray], fingerprint: np.ndarray | None) -> int:
    """crc32 of all that was written once: names, kinds and bytes."""
    found = 0
    for name, values in sorted({**constants, **({} if fingerprint is None else {"": fingerprint})}.items()):
        found = zlib.crc32(f"{name} {values.dtype.str} {values.shape}".encode(), crc32(values, found))
    return found


def crc32(values: Vector | np.generic, previous: int = 0) -> int:
    """Of the bytes of an array, which is not copied for it."""
    for part in values.views if isinstance(values, Pieces) else (np.ascontiguousarray(values).data,):
        previous = zlib.crc32(part, previous)
    return previous
