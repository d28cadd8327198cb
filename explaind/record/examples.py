"""Stable example ids: who is in a batch."""

import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from explaind.errors import RecordError

T_co = TypeVar("T_co", covariant=True)


class MapStyle(Protocol[T_co]):
    """A dataset with a length and integer keys."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...


ID = "example_id"
"""Key of its id in an example that is a mapping."""


class Indexed(Generic[T_co]):
    """A dataset whose items hold their index: ``(i, *item)`` for a tuple, ``{"example_id": i, **item}`` for a mapping, ``(i, item)``."""

    def __init__(self, dataset: MapStyle[T_co]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...] | dict[str, Any]:
        item = self.dataset[index]
        if isinstance(item, Mapping):
            return {ID: index, **item}
        return (index, *item) if isinstance(item, tuple | list) else (index, item)


def indexed(dataset: MapStyle[T_co]) -> Indexed[T_co]:
    """Make any map-style dataset yield its index first, so that a loader hands out ids with every batch."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise RecordError(
            "only map-style datasets have stable ids",
            expected="__len__ and __getitem__",
            got=type(dataset).__name__,
            do="yield your own integer ids and give them to recorder.examples",
        )
    return Indexed(dataset)


def checked_ids(ids: Tensor | np.ndarray | Sequence[int], examples: int | None) -> np.ndarray:
    """ids as int64 [batch]; RecordError when they are no ids or out of range."""
    values = ids.numpy(force=not ids.is_cpu or ids.requires_grad) if isinstance(ids, Tensor) else np.asarray(ids)
    if values.ndim != 1 or values.size == 0 or values.dtype.kind not in "iu":
        raise RecordError(
            "examples() takes the ids of a batch",
            expected="a non-empty 1-D list or tensor of integers",
            got=f"{values.dtype} of shape {values.shape}",
            do="pass the ids that the loader yields (explaind.indexed)",
        )
    values = values.astype(np.int64)
    most = np.iinfo(np.int64).max if examples is None else examples
    unsigned = values.view(np.uint64)  # where negative ones are the largest
    if unsigned[unsigned.argmax()] >= most:  # on a batch of usual size several times as fast as max
        top = "" if examples is None else f" and below {examples}"
        wrong = values[(values < 0) | (values >= most)]
        raise RecordError(
            "an example id is out of range", expected=f"ids from 0{top}", got=int(wrong[0]), do="pass the index of each example in the data"
        )
    return values


def checked_weights(weights: Tensor | np.ndarray | Sequence[float] | None, reduction: str, count: int) -> np.ndarray:
    """The factor on each example's loss: float64 [batch]."""
    if weights is None:
        return _alike(1.0 / count if reduction == "mean" else 1.0, count)
    values = weights.detach().cpu().numpy() if isinstance(weights, Tensor) else np.asarray(weights)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise RecordError(
            "weights must be one finite number per example",
            expected=f"shape ({count},)",
            got=f"shape {values.shape}",
            do="pass the factor that the training loss puts on each example",
        )
    return values.astype(np.float64)


@lru_cache(maxsize=4)
def _alike(weight: float, count: int) -> np.ndarray:
    """The same weight so often, for reading: a single number in memory, however large the batch is."""
    return np.broadcast_to(np.float64(weight), (count,))


def fingerprint(item: Any) -> int:
    """crc32 of an example's numbers, whatever nest of tensors, arrays and scalars it is."""
    if isinstance(item, dict):
        return _joined(item[key] for key in sorted(item))
    if isinstance(item, tuple | list):
        return _joined(item)
    if isinstance(item, Tensor):
        item = (item.float() if item.dtype == torch.bfloat16 else item).numpy(force=True)
    if isinstance(item, str | bytes):
        return zlib.crc32(item.encode() if isinstance(item, str) else item)
    return zlib.crc32(np.ascontiguousarray(item).tobytes())


def _joined(items: Any) -> int:
    return zlib.crc32(b"".join([fingerprint(item).to_bytes(4, "little") for item in items]))


def fingerprints(data: MapStyle[Any]) -> np.ndarray:
    """uint32 [example]: one fingerprint for each ``data[i]``."""
    return np.array([fingerprint(data[i]) for i in range(len(data))], dtype=np.uint32)
