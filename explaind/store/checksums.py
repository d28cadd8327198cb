"""Checksums of what a step recorded, chained from step to step: a row that is changed, removed or moved breaks the chain."""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from explaind.store.manifest import Layer
from explaind.store.row import Pieces, StepRow, Vector, views_of


class Chain:
    """How far the checksums of a run have come, before a step."""

    __slots__ = ("link", "step", "theta")

    def __init__(self, theta: np.ndarray, step: int) -> None:
        self.theta = theta
        """Of the parameters before it: uint32 [layer]."""
        self.step = step
        """Of all else that the step before it recorded; 0 before the first."""
        self.link = zlib.crc32(theta.data, step)
        """crc32 of both: what was recorded behind other steps goes on from another link."""


def theta_checksum(theta: Vector, layers: Sequence[Layer], previous: np.ndarray) -> np.ndarray:
    """crc32 of each layer's bytes, continued from the previous state's: uint32 [layer]; pieces are a layer each."""
    whole = theta if isinstance(theta, Pieces) else np.ascontiguousarray(theta)
    parts = whole.views if isinstance(whole, Pieces) else [whole[a.offset : a.offset + a.size].data for a in layers]
    return np.array([*map(zlib.crc32, parts, previous.tolist())], dtype=np.uint32)


def step_checksum(row: StepRow, mode: int, previous: int, thin: np.ndarray | None = None) -> int:
    """crc32 of everything else that a step recorded, continued from the previous step's; thin: with theta's checksum before the step."""
    previous = zlib.crc32(mode.to_bytes(4, "little", signed=True), zlib.crc32(row.small, previous))
    early, late = row.views
    for view in early:
        previous = zlib.crc32(view, previous)
    if row.gap:
        previous = zlib.crc32(np.int64(row.gap).tobytes(), previous)
    if row.precision:
        previous = zlib.crc32(np.float64(row.precision).tobytes(), previous)
    for view in late:
        previous = zlib.crc32(view, previous)
    return previous if thin is None else crc32(thin, previous)


def text_checksum(value: Any) -> int:
    """crc32 of what JSON holds, whatever the order of its keys."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def constants_checksum(constants: Mapping[str, np.ndarray], fingerprint: np.ndarray | None) -> int:
    """crc32 of all that was written once: names, kinds and bytes."""
    found = 0
    for name, values in sorted({**constants, **({} if fingerprint is None else {"": fingerprint})}.items()):
        found = zlib.crc32(f"{name} {values.dtype.str} {values.shape}".encode(), crc32(values, found))
    return found


def crc32(values: Vector, previous: int = 0) -> int:
    """Of the bytes of an array, which is not copied for it."""
    for view in views_of(values):
        previous = zlib.crc32(view, previous)
    return previous
