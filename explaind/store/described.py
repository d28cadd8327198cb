"""What zarr.json says of the arrays and groups of a run in a folder, and how their chunks are encoded then.

Zarr says the same, byte for byte (tests/test_growing.py). But it asks an event loop, threads and the caches of every abstract class for it,
which a small training would pay for with more time and memory than for its parameters.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import zarr
from numcodecs.blosc import Blosc
from zarr.codecs import BloscCodec, BytesCodec

from explaind.errors import StoreError
from explaind.store import bitdelta, schema
from explaind.store.bitdelta import BitDelta, Packing
from explaind.store.durable import Text

FILE = "zarr.json"
SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}


class Described:
    """An array of a folder, as its metadata tell it."""

    def __init__(self, name: str, metadata: Mapping[str, Any]) -> None:
        """metadata: of an array whose chunks are regular. StoreError for codecs that no recording writes."""
        self.name, self.shape = name, tuple[int, ...](metadata["shape"])
        self.chunks = tuple[int, ...](metadata["chunk_grid"]["configuration"]["chunk_shape"])
        self.bitdelta: BitDelta | None = None
        """Its codec, where it is packed tile by tile."""
        self._blosc: Blosc | None = None
        first, *others = codecs = metadata["codecs"]
        options = first.get("configuration", {})
        if first["name"] == bitdelta.NAME and not others:
            self.bitdelta = BitDelta.from_dict(first)
        elif first["name"] == "bytes" and options.get("endian", "little") == "little" and [codec["name"] for codec in others] == ["blosc"]:
            told = others[0]["configuration"]
            self._blosc = Blosc(told["cname"], told["clevel"], SHUFFLES[told["shuffle"]], told["blocksize"])
        else:
            raise StoreError("an array has codecs that no recording writes", where=name, got=codecs, do="record to another path")
        self.dtype = np.dtype(metadata["data_type"])
        told = metadata["fill_value"]
        # JSON has numbers, "NaN" and "Infinity", and pairs of them.
        self.fill_value: Any = self.dtype.type(complex(*map(float, told)) if isinstance(told, list | tuple) else told)
        marks = ["?", "?"] if self.shape else []
        self._around = [*text({**metadata, "shape": marks}).decode().split('"?"', len(marks)), "", ""][:3]

    def encoded(self, chunk: np.ndarray) -> Text:
        """The bytes of a chunk, in pieces; packed ones may have fewer rows, behind which there are fill values."""
        if self.bitdelta is not None:
            values = chunk.reshape(len(chunk), -1).astype(self.dtype, copy=False)
            return Packing.of(values, self.bitdelta.columns, self.behind(len(chunk)))
        assert self._blosc is not None
        return [(0, bytes(self._blosc.encode(np.ascontiguousarray(chunk, self.dtype.newbyteorder("<")))))]

    def behind(self, rows: int) -> Any:
        """What stands in a chunk behind so many rows; None where there are no more."""
        return self.fill_value if rows < self.chunks[0] else None

    def text(self, shape: Sequence[int]) -> bytes:
        """The metadata of this array with other extents: only these are told anew, since that is done for every span."""
        before, between, behind = self._around
        return (before + between.join(map(str, shape)) + behind).encode()


def column(told: schema.Column, rows: int) -> Described:
    """An empty growing array whose chunks hold `rows` rows."""
    codecs = schema.codec(told.codec, told.tile)
    packs = [codecs["serializer"]] if codecs["compressors"] is None else codecs["compressors"]
    return _described(told.name, (0, *told.shape), told.chunks(rows), np.dtype(told.dtype), told.fill, packs, told.dims)


def finished(name: str, values: np.ndarray, dims: Sequence[str]) -> Described:
    """An array of numbers that stands in one chunk."""
    return _described(name, values.shape, tuple(max(1, n) for n in values.shape), values.dtype, 0, [schema.lossless()], dims)


def text(metadata: Mapping[str, Any]) -> bytes:
    """As zarr writes it."""
    return json.dumps(metadata, indent=zarr.config.get("json_indent")).encode()


def group(attributes: Mapping[str, Any]) -> bytes:
    """The text of a group."""
    return text({"attributes": attributes, "zarr_format": 3, "node_type": "group"})


def _described(
    name: str, shape: Sequence[int], chunks: Sequence[int], dtype: np.dtype[Any], fill: float, packs: Sequence[Any], dims: Sequence[str]
) -> Described:
    codecs = list(packs)
    if isinstance(codecs[0], BloscCodec):
        ends = BytesCodec(endian="little" if dtype.itemsize > 1 else None)
        codecs = [ends, *(replace(codec, typesize=dtype.itemsize) for codec in codecs)]
    metadata = {
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": _number(dtype.type(fill)),
        "codecs": [codec.to_dict() for codec in codecs],
        "attributes": {},
        **({"dimension_names": list(dims)} if dims else {}),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
    return Described(name, metadata)


def _number(value: Any) -> Any:
    """A fill value in JSON."""
    if isinstance(value, np.complexfloating):
        return [_number(value.real), _number(value.imag)]
    if np.isfinite(value):
        return value.item()
    return "NaN" if np.isnan(value) else "Infinity" if value > 0 else "-Infinity"
