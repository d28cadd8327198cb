"""A zarr codec for floats that change little from row to row. Exact: every bit pattern comes back, NaN payloads and signed zeros too.

Floats become integers of the same order, so that neighbours on the number line are neighbours in bits; each column is differenced
down the rows, up to three times; the sign is folded into the last bit. Columns of alike residuals are then put side by side, so that
whole planes of their bits are zero, which is what bitshuffle and lz4 are good at.

A chunk is read as a matrix [row, column], the rows along its first axis, and written as

    crc     uint32        of everything behind it
    kept    uint32        rows in front of those at the end that hold a single bit pattern, such as the fill value
    rest    uint64        that pattern

and tiles of as many columns as make CELLS numbers:

    order   uint8         how often the rows are differenced
    sizes   uint32, ×2    bytes of the two parts that follow
    widths  uint8 [column], blosc       bits of the largest residual of a column; columns stand in their stable order by it
    bits    uint [row, column], blosc   the residuals, and zeros up to a multiple of EIGHT numbers

All integers are little-endian.
"""

import asyncio
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numcodecs import blosc
from zarr.abc.codec import ArrayBytesCodec
from zarr.registry import register_codec

NAME = "explaind.bitdelta"
CELLS = 1 << 18
"""Numbers of a tile: enough columns to sort."""
TOGETHER = 1 << 12
"""Columns of the tiles that are worked on together: every call of numpy lets another thread have the interpreter, and asks for it again.
Rows of more would not stay in a processor's cache."""
SAMPLE = 16
"""One column in so many says how often to difference."""
ORDERS = 3
LEVEL = 9
"""Of lz4: 5 takes a tenth less time and half a percent more room."""
EIGHT = 8
"""Blosc shuffles bits of so many numbers at a time, and silently leaves them as they are where the count is no multiple of it."""
CRC, HEAD, TILE_HEAD = struct.Struct("<I"), struct.Struct("<IQ"), struct.Struct("<BII")
BLOSC_HEAD = struct.Struct("<4BIII")


def turned(bits: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The bits of floats, as signed integers, to signed integers in the floats' order; twice is back again."""
    # A negative float grows with its magnitude: all its bits but the sign are turned round.
    mask = np.right_shift(bits, 8 * bits.itemsize - 1, out=out)
    mask &= np.iinfo(bits.dtype).max
    mask ^= bits
    return mask


def folded(numbers: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Signed 0, −1, 1, −2, … to unsigned 0, 1, 2, 3, …; where it is told where to, the numbers are lost."""
    signs = np.right_shift(numbers, 8 * numbers.itemsize - 1, out=out)
    signs ^= np.left_shift(numbers, 1, out=None if out is None else numbers)
    return signs.view(f"u{numbers.itemsize}")


def unfolded(numbers: np.ndarray) -> np.ndarray:
    """What ``folded`` was given."""
    out = numbers & 1
    np.negative(out, out=out)
    out ^= numbers >> 1
    return out.view(f"i{numbers.itemsize}")


def summed(differences: np.ndarray, order: int) -> np.ndarray:
    """What was differenced down the rows so often, as ``_run`` does it: overflow wraps round, and wraps back."""
    numbers = differences.copy()
    for k in reversed(range(order)):
        for above, row in pairwise(numbers[k:]):  # numpy's own accumulate goes down the columns, one number a cache line
            row += above
    return numbers


def packed(values: np.ndarray) -> bytes:
    """A matrix of floats [row, column]."""
    bits = values.view(f"<i{values.itemsize}")
    kept, rest = len(bits), bits[-1, -1] if bits.size else bits.dtype.type(0)
    while kept and (bits[kept - 1] == rest).all():
        kept -= 1
    parts, crc = [HEAD.pack(kept, int(rest) & 0xFFFF_FFFF_FFFF_FFFF)], 0
    tiles = list(_tiles(kept, bits.shape[1]))
    runs = list(_runs(tiles, _orders(bits[:kept], tiles)))
    # Memory that was used already is much faster.
    rooms = np.empty((2, kept * max((stop - start for start, stop, _ in runs), default=0) + EIGHT), bits.dtype)
    for start, stop, order in runs:
        for tile in _run(bits[:kept, start:stop], order, tiles[0][1], *rooms):
            parts += tile
    for part in parts:
        crc = zlib.crc32(part, crc)
    return b"".join([CRC.pack(crc), *parts])


def _tiles(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    wide = max(1, CELLS // max(1, rows))
    return ((start, min(start + wide, columns)) for start in range(0, columns if rows else 0, wide))


def _runs(tiles: Sequence[tuple[int, int]], orders: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Neighbouring tiles of one order, as (start, stop, order): no more than are worked on together."""
    start, stop, order = 0, 0, -1
    for (left, right), own in zip(tiles, orders, strict=True):
        if stop and (own != order or right - start > TOGETHER):
            yield start, stop, order
            start = left
        stop, order = right, own
    if stop:
        yield start, stop, order


def _orders(bits: np.ndarray, tiles: Sequence[tuple[int, int]]) -> list[int]:
    """How often to difference each tile: what leaves the fewest bits."""
    if not tiles:
        return []
    chosen = [np.arange(start, stop, SAMPLE) for start, stop in tiles]
    firsts = np.cumsum([0, *map(len, chosen[:-1])])
    numbers, left = turned(np.take(bits, np.concatenate(chosen), axis=1)), list[np.ndarray]()
    most = _settled(len(bits))
    for k in range(most + 1):
        numbers = np.subtract(numbers[1:], numbers[:-1]) if k else numbers
        ends = [folded(end(numbers[most - k :], axis=0)) for end in (np.max, np.min)]
        left.append(np.add.reduceat(_length(np.maximum(*ends)), firsts, dtype=np.int64))
    found: list[int] = np.argmin(left, axis=0).tolist()
    return found


def _run(bits: np.ndarray, order: int, wide: int, room: np.ndarray, other: np.ndarray) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Tiles of so many columns, differenced so often; in rooms of their size, and some more."""
    size, shape = bits.size, bits.shape
    numbers, spare = (whole[:size].reshape(shape) for whole in (room, other))
    turned(bits, out=numbers)
    for k in range(order):
        spare[: k + 1] = numbers[: k + 1]
        np.subtract(numbers[k + 1 :], numbers[k:-1], out=spare[k + 1 :])
        numbers, spare, room, other = spare, numbers, other, room
    residuals = folded(numbers, out=spare)
    widths = _length(residuals[_settled(len(residuals)) :].max(axis=0))
    for start in range(0, shape[1], wide):
        own = widths[start : start + wide]
        count, columns = shape[0] * len(own), start + np.argsort(own, kind="stable")
        np.take(residuals, columns, axis=1, out=room[:count].reshape(shape[0], -1).view(residuals.dtype), mode="clip")
        room[count : count + EIGHT] = 0
        table = blosc.compress(own, b"zstd", 1, blosc.SHUFFLE)
        alike = blosc.compress(room[: count + -count % EIGHT], b"lz4", LEVEL, blosc.BITSHUFFLE)
        yield TILE_HEAD.pack(order, len(table), len(alike)), table, alike


def _settled(rows: int) -> int:
    """The first row whose residual is differenced in full at every order: those above hold starting values, which are alike in size."""
    return min(ORDERS, rows - 1)


def _length(largest: np.ndarray) -> np.ndarray:
    """uint8 [column]: bits that an unsigned number takes."""
    return np.frexp(largest.astype(np.float64))[1].astype(np.uint8)


def unpacked(text: bytes, shape: tuple[int, int], dtype: np.dtype[Any]) -> np.ndarray:
    """What ``packed`` was given: [row, column]. ValueError where the bytes are not what it made; no more memory than the matrix takes."""
    if len(text) < CRC.size + HEAD.size or CRC.unpack_from(text)[0] != zlib.crc32(memoryview(text)[CRC.size :]):
        raise _damaged()
    kept, rest = HEAD.unpack_from(text, CRC.size)
    if kept > shape[0]:
        raise _damaged()
    out, at = np.empty(shape, f"<i{dtype.itemsize}"), CRC.size + HEAD.size
    for start, stop in _tiles(kept, shape[1]):
        if at + TILE_HEAD.size > len(text):
            raise _damaged()
        order, *sizes = TILE_HEAD.unpack_from(text, at)
        ends = at + TILE_HEAD.size, at + TILE_HEAD.size + sizes[0], at + TILE_HEAD.size + sum(sizes)
        if order > ORDERS:
            raise _damaged()
        widths = _inflated(text[ends[0] : ends[1]], (stop - start,), np.dtype(np.uint8), zeros=1)
        alike = _inflated(text[ends[1] : ends[2]], (kept, stop - start), np.dtype(f"<u{dtype.itemsize}"))
        residuals = np.take(alike, np.argsort(np.argsort(widths, kind="stable")), axis=1)
        out[:kept, start:stop] = turned(summed(unfolded(residuals), order))
        at = ends[2]
    if at != len(text):
        raise _damaged()
    out.view(f"<u{dtype.itemsize}")[kept:] = rest & (256**dtype.itemsize - 1)
    return out.view(dtype)


def _inflated(text: bytes, shape: tuple[int, ...], dtype: np.dtype[Any], zeros: int = EIGHT) -> np.ndarray:
    """Blosc allocates, and reads, what its header says, which is therefore looked at first. zeros: as in ``EIGHT``."""
    if len(text) < BLOSC_HEAD.size:
        raise _damaged()
    *_, size, _, length = BLOSC_HEAD.unpack_from(text)
    count = prod(shape)
    if size not in (count * dtype.itemsize, (count + -count % zeros) * dtype.itemsize) or length != len(text):
        raise _damaged()  # chunks of before the zeros were added have none
    try:
        return np.frombuffer(blosc.decompress(text), dtype)[:count].reshape(shape)
    except RuntimeError as error:
        raise _damaged() from error


def _damaged() -> ValueError:
    return ValueError(f"a chunk of {NAME} is damaged or cut off")


@dataclass(frozen=True)
class BitDelta(ArrayBytesCodec):
    """The codec as zarr knows it: from a chunk of floats to bytes."""

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "BitDelta":
        """ValueError for a configuration, which there is none of."""
        if data.get("configuration"):
            raise ValueError(f"{NAME} has no configuration, got {data['configuration']}")
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {"name": NAME}

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        """TypeError for an array of anything but floats."""
        native = dtype.to_native_dtype()
        if native.kind != "f" or native.itemsize > 8:
            raise TypeError(f"{NAME} is for floats of 16, 32 and 64 bits, not for {native}")

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        raise NotImplementedError

    async def _encode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
        # In the loop's own thread: a run is written a chunk at a time, and every other thread would keep some memory to itself.
        return self._encode(chunk_data, chunk_spec)

    async def _decode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
        return await asyncio.to_thread(self._decode, chunk_data, chunk_spec)

    def _encode(self, chunk: Any, spec: Any) -> Any:
        values = chunk.as_numpy_array().astype(_little(spec), copy=False)
        return spec.prototype.buffer.from_bytes(packed(values.reshape(_matrix(spec.shape))))

    def _decode(self, chunk: Any, spec: Any) -> Any:
        values = unpacked(chunk.to_bytes(), _matrix(spec.shape), _little(spec))
        return spec.prototype.nd_buffer.from_numpy_array(values.reshape(spec.shape))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A chunk's extents as rows and columns."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def _little(spec: Any) -> np.dtype[Any]:
    """Of a chunk, little-endian: what stands in the file does not depend on the machine."""
    dtype: np.dtype[Any] = spec.dtype.to_native_dtype()
    return dtype.newbyteorder("<")


register_codec(NAME, BitDelta)  # for whoever imports this; other readers find it by the package's entry point
