"""A zarr codec for floats that change little from row to row. Exact: every bit pattern comes back, NaN payloads and signed zeros too.

Floats become integers of the same order, so that neighbours on the number line are neighbours in bits; each column is differenced
down the rows, up to three times; the sign is folded into the last bit. Columns of alike residuals are then put side by side, so that
whole planes of their bits are zero, which is what bitshuffle and lz4 are good at.

A chunk is read as a matrix [row, column], the rows along its first axis, and written as

    crc     uint32        of everything behind it
    kept    uint32        rows in front of those at the end that hold a single bit pattern, such as the fill value
    rest    uint64        that pattern

and tiles of so many columns as the codec's configuration says, or of as many as make CELLS numbers:

    order   uint8         how often the rows are differenced
    sizes   uint32, ×2    bytes of the two parts that follow
    widths  uint8 [column], blosc       bits of the largest residual of a column; columns stand in their stable order by it
    bits    uint [row, column], blosc   the residuals, and zeros up to a multiple of EIGHT numbers

All integers are little-endian.
"""

import asyncio
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numcodecs import blosc
from zarr.abc.codec import ArrayBytesCodec
from zarr.registry import register_codec

with suppress(ImportError):  # where there is none numcodecs does without
    import multiprocessing.synchronize  # noqa: F401  it would be loaded with the first chunk, while somebody trains

NAME = "explaind.bitdelta"
CELLS = 1 << 18
"""Numbers of a tile, where its width is not told: enough columns to sort."""
PIECE = 1 << 16
"""Bytes whose checksum is made at a time."""
SAMPLE = 32
"""So many columns of a tile, about, say how often to difference, as well as more of them would."""
ORDERS = 3
LEVEL = 5
"""Of lz4: 9 takes a tenth more time and a percent less room."""
BLOCK = 1 << 14
"""Numbers that blosc takes at a time, the least that it does of four bytes: of what it takes it holds two copies more."""
EIGHT = 8
"""Blosc shuffles bits of so many numbers at a time, and silently leaves them as they are where the count is no multiple of it."""
CRC, HEAD, TILE_HEAD = struct.Struct("<I"), struct.Struct("<IQ"), struct.Struct("<BII")
BLOSC_HEAD = struct.Struct("<4BIII")


def turned(bits: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The bits of floats, as signed integers, to signed integers in the floats' order; twice is back again."""
    # A negative float grows with its magnitude: all its bits but the sign are turned round.
    sign = 8 * bits.itemsize - 1
    mask = np.right_shift(bits, sign, out=out)
    mask &= (1 << sign) - 1
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
    """What was differenced down the rows so often, as a ``Packing`` does it: overflow wraps round, and wraps back."""
    numbers = differences.copy()
    for k in reversed(range(order)):
        for above, row in pairwise(numbers[k:]):  # numpy's own accumulate goes down the columns, one number a cache line
            row += above
    return numbers


Read = Callable[[np.ndarray, int], None]
"""Fills a matrix [row, column] with the columns of another from there on; it may have fewer rows."""


class Packing:
    """What ``packed`` makes of a matrix that is read tile by tile, so that no more than a few tiles are in memory."""

    def __init__(
        self, shape: tuple[int, int], dtype: np.dtype[Any], read: Read | np.ndarray, wide: int | None = None, behind: Any = None
    ) -> None:
        """read: or the matrix itself; wide: columns of a tile; behind: the number in all rows behind these, where there are more."""
        self._columns, self._dtype, self._read, self._wide = shape[1], dtype.newbyteorder("<"), read, wide
        most = CELLS if wide is None else shape[0] * wide
        self._size = max(shape[0], min(most, shape[0] * shape[1])) + EIGHT
        self._room: np.ndarray | None = None
        self._loaded: tuple[int, int] | None = None
        self.kept = self.rest = 0
        """Rows in front of those at the end that hold a single bit pattern; and that, as an unsigned number."""
        if behind is not None:
            self.rest = self._bits_of(behind)
        for start, stop in _tiles(*shape, wide):
            bits = self._bits(start, stop, shape[0])
            if not start and behind is None:
                self.rest = int(bits[-1, 0]) & (256**dtype.itemsize - 1)
            self.kept = max(self.kept, _kept(bits.view(f"<u{dtype.itemsize}"), self.rest))
            if self.kept == shape[0]:
                break

    @classmethod
    def of(cls, values: np.ndarray, wide: int | None = None, behind: Any = None) -> "Packing":
        """Of a matrix at hand, which is not copied."""
        little = values.dtype.newbyteorder("<")
        return cls((values.shape[0], values.shape[1]), little, values.astype(little, copy=False), wide, behind)

    def holds(self, number: Any) -> bool:
        """Whether that is all there is, bit for bit."""
        return not self.kept and self._bits_of(number) == self.rest

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Its bytes, piece by piece, each with its place; the checksum comes last."""
        at, crc = CRC.size, 0
        for part in self._parts():
            crc = zlib.crc32(part, crc)
            yield at, part
            at += len(part)
            del part  # not to be held while the next one is made
        yield 0, CRC.pack(crc)

    def _parts(self) -> Iterator[bytes]:
        """All but the checksum; what is large stands alone, since nothing else can be done while it is copied."""
        ahead = HEAD.pack(self.kept, self.rest)
        for tile in _tiles(self.kept, self._columns, self._wide):
            widths, alike = self._tile(*tile)
            yield b"".join([ahead, TILE_HEAD.pack(self._order, len(widths), len(alike)), widths])
            yield alike
            ahead = b""
            del alike
        if ahead:
            yield ahead

    def _bits_of(self, number: Any) -> int:
        return int.from_bytes(np.asarray(number, self._dtype).tobytes(), "little")

    def _bits(self, start: int, stop: int, rows: int) -> np.ndarray:
        """The first rows of columns [start, stop), as signed integers; those that are read stand in the room of a tile."""
        kind = f"<i{self._dtype.itemsize}"
        if isinstance(self._read, np.ndarray):
            return self._read[:rows, start:stop].view(kind)
        if self._room is None:
            self._room = np.empty(self._size, kind)
        bits = self._room[: rows * (stop - start)].reshape(rows, -1)
        if self._loaded != (start, stop):
            self._read(bits.view(self._dtype), start)
        self._loaded = start, stop  # its first rows are those of fewer, too
        return bits

    def _tile(self, start: int, stop: int) -> tuple[bytes, bytes]:
        """The two parts of a tile."""
        widths, room = self._sorted(self._bits(start, stop, self.kept))
        count = self.kept * (stop - start)
        room[count : count + EIGHT] = 0
        table = blosc.compress(widths, b"zstd", 1, blosc.SHUFFLE)
        alike = blosc.compress(room[: count + -count % EIGHT], b"lz4", LEVEL, blosc.BITSHUFFLE, BLOCK)
        self._room = room  # memory that was used already is much faster
        return table, alike

    def _sorted(self, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The residuals of a tile in the order of their columns' widths, in a room; and these. The other room is given back."""
        self._order = _order(bits)
        room, other = self._room, np.empty(self._size, bits.dtype)
        room = np.empty_like(other) if room is None else room
        self._room = self._loaded = None
        numbers, spare = (whole[: bits.size].reshape(bits.shape) for whole in (other, room))
        turned(bits, out=numbers)
        for k in range(self._order):
            spare[: k + 1] = numbers[: k + 1]
            np.subtract(numbers[k + 1 :], numbers[k:-1], out=spare[k + 1 :])
            numbers, spare, room, other = spare, numbers, other, room
        residuals = folded(numbers, out=spare)
        widths = _length(residuals[_settled(len(residuals)) :].max(axis=0))
        np.take(residuals, np.argsort(widths, kind="stable"), axis=1, out=numbers.view(residuals.dtype), mode="clip")
        return widths, other


def packed(values: np.ndarray, wide: int | None = None, behind: Any = None) -> bytes:
    """A matrix of floats [row, column]; wide and behind: as of a ``Packing``."""
    return b"".join([text for _, text in sorted(Packing.of(values, wide, behind))])


def _crc(parts: Iterable[bytes]) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def _kept(bits: np.ndarray, rest: int) -> int:
    """Rows in front of those that hold nothing but that."""
    kept = len(bits)
    while kept and (bits[kept - 1] == rest).all():
        kept -= 1
    return kept


def _tiles(rows: int, columns: int, wide: int | None) -> Iterator[tuple[int, int]]:
    most = max(1, CELLS // max(1, rows)) if wide is None else wide
    return ((start, min(start + most, columns)) for start in range(0, columns if rows else 0, most))


def _order(bits: np.ndarray) -> int:
    """How often to difference a tile: what leaves the fewest bits."""
    numbers, most = turned(bits[:, :: max(1, bits.shape[1] // SAMPLE)]), _settled(len(bits))
    largest = np.empty((most + 1, numbers.shape[1]), f"u{bits.itemsize}")
    for k, own in enumerate(largest):
        numbers = np.subtract(numbers[1:], numbers[:-1]) if k else numbers
        np.bitwise_or.reduce(folded(numbers[most - k :]), axis=0, out=own)  # which has as many bits as the largest
    return int(_length(largest).sum(axis=1).argmin())


def _settled(rows: int) -> int:
    """The first row whose residual is differenced in full at every order: those above hold starting values, which are alike in size."""
    return min(ORDERS, rows - 1)


def _length(largest: np.ndarray) -> np.ndarray:
    """Bits that unsigned numbers take: uint8 in their shape."""
    return np.frexp(largest.astype(np.float64))[1].astype(np.uint8)


def unpacked(text: bytes, shape: tuple[int, int], dtype: np.dtype[Any], wide: int | None = None) -> np.ndarray:
    """What ``packed`` was given: [row, column]. ValueError where the bytes are not what it made; a few times its memory at most."""
    out = np.empty(shape, dtype.newbyteorder("<"))
    for start, values, rest in tiles(lambda at, stop: text[at:stop], len(text), shape, dtype, wide):
        part = out[:, start : start + values.shape[1]]
        part[: len(values)], part[len(values) :] = values, rest
    return out


def tiles(
    text: Callable[[int, int], bytes], size: int, shape: tuple[int, int], dtype: np.dtype[Any], wide: int | None = None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The same one after another: the first column of each, its numbers [row, column], and the one that is in all rows behind these.

    text: gives the bytes from one place to another, out of so many.
    """
    front = text(0, CRC.size + HEAD.size)
    if len(front) < CRC.size + HEAD.size or CRC.unpack_from(front)[0] != _crc(text(at, at + PIECE) for at in range(CRC.size, size, PIECE)):
        raise _damaged()
    kept, number = HEAD.unpack_from(front, CRC.size)
    if kept > shape[0]:
        raise _damaged()
    at, unsigned, little = len(front), np.dtype(f"<u{dtype.itemsize}"), dtype.newbyteorder("<")
    rest = np.array(number & (256**dtype.itemsize - 1), unsigned).view(little)
    if not kept:
        yield 0, np.empty((0, shape[1]), little), rest
    for start, stop in _tiles(kept, shape[1], wide):
        head = text(at, at + TILE_HEAD.size)
        if len(head) < TILE_HEAD.size:
            raise _damaged()
        order, *sizes = TILE_HEAD.unpack(head)
        ends = at + TILE_HEAD.size, at + TILE_HEAD.size + sizes[0], at + TILE_HEAD.size + sum(sizes)
        if order > ORDERS or ends[2] > size:
            raise _damaged()
        widths = _inflated(text(ends[0], ends[1]), (stop - start,), np.dtype(np.uint8), zeros=1)
        alike = _inflated(text(ends[1], ends[2]), (kept, stop - start), unsigned)
        residuals = np.take(alike, np.argsort(np.argsort(widths, kind="stable")), axis=1)
        yield start, turned(summed(unfolded(residuals), order)).view(little), rest
        at = ends[2]
    if at != size:
        raise _damaged()


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

    columns: int | None = None
    """Of a tile; None: as many as make CELLS numbers."""
    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "BitDelta":
        """ValueError for a configuration that says anything but how wide a tile is."""
        told = data.get("configuration") or {}
        if not told:
            return cls()
        columns = told.get("columns") if isinstance(told, dict) and len(told) == 1 else None
        if type(columns) is not int or not 0 < columns <= CELLS:
            raise ValueError(f"the configuration of {NAME} holds a number of columns up to {CELLS}, or nothing; got {told}")
        return cls(columns)

    def to_dict(self) -> dict[str, Any]:
        return {"name": NAME} if self.columns is None else {"name": NAME, "configuration": {"columns": self.columns}}

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
        return spec.prototype.buffer.from_bytes(packed(values.reshape(_matrix(spec.shape)), self.columns))

    def _decode(self, chunk: Any, spec: Any) -> Any:
        values = unpacked(chunk.to_bytes(), _matrix(spec.shape), _little(spec), self.columns)
        return spec.prototype.nd_buffer.from_numpy_array(values.reshape(spec.shape))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A chunk's extents as rows and columns."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def _little(spec: Any) -> np.dtype[Any]:
    """Of a chunk, little-endian: what stands in the file does not depend on the machine."""
    dtype: np.dtype[Any] = spec.dtype.to_native_dtype()
    return dtype.newbyteorder("<")


register_codec(NAME, BitDelta)  # for whoever imports this; other readers find it by the package's entry point
