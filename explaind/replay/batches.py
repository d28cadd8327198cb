"""Batches as the training saw them, rebuilt from the data and the recorded ids."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import default_collate

from explaind.errors import ReplayError
from explaind.record.examples import fingerprint
from explaind.store.reader import Run

KEEP_BYTES = 1 << 30
"""Data up to this size is stacked once and indexed; larger data is collated batch by batch."""


@runtime_checkable
class Readable(Protocol):
    """Data by id: ``data[i]``."""

    def __getitem__(self, index: int, /) -> Any: ...


Collate = Callable[[list[Any]], Any]


def moved(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A copy of a batch on the device, its floating-point tensors in the kernel's dtype."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype, copy=True) if leaf.is_floating_point() else leaf.to(device, copy=True)

    return tree_map(move, batch)


def count(batch: Any) -> int:
    """How many examples or queries a batch holds: the first dimension of its tensors."""
    sizes = {leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim}
    if len(sizes) != 1:
        raise ReplayError(
            "the tensors of a batch must share their first dimension",
            expected="one size",
            got=sorted(sizes) or "no tensors",
            do="give a batch as torch's default_collate makes it",
        )
    return int(sizes.pop())


class Batches:
    """Serves ``collate([data[i] for i in ids])`` on a device, reading each example as seldom as memory allows."""

    def __init__(self, data: Readable, ids: np.ndarray, collate: Collate | None, device: torch.device, dtype: torch.dtype) -> None:
        self._data, self._collate, self._device, self._dtype = data, collate or default_collate, device, dtype
        self.plain = collate is None
        """Whether it is torch's ``default_collate`` that makes them."""
        self._last: tuple[bytes, Any] | None = None
        self._rows: np.ndarray | None = None
        self._stack = self._stacked(ids) if collate is None and len(ids) else None

    def _items(self, ids: Sequence[int]) -> list[Any]:
        try:
            return [self._data[i] for i in ids]
        except (IndexError, KeyError) as error:
            raise ReplayError(
                "the data lacks an example of the run",
                expected=f"ids up to {max(ids)}",
                got=repr(error),
                do="give the data of the training",
            ) from error

    def _stacked(self, ids: np.ndarray) -> Any:
        first = default_collate(self._items(ids[:1].tolist()))
        size = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(first) if isinstance(leaf, Tensor))
        if size * len(ids) > KEEP_BYTES or not all(isinstance(leaf, Tensor) for leaf in tree_leaves(first)):
            return None
        try:
            stack = default_collate(self._items(ids.tolist()))
        except (RuntimeError, TypeError):  # examples of different shapes: batch by batch then
            return None
        self._rows = ids
        return moved(stack, self._device, self._dtype)

    def __call__(self, ids: np.ndarray) -> Any:
        """The batch of these ids; the last one is kept, since full-batch training asks for it again at every step."""
        key = ids.tobytes()
        if self._last is None or self._last[0] != key:
            self._last = (key, self._make(ids))
        return self._last[1]

    def _make(self, ids: np.ndarray) -> Any:
        if self._stack is None or self._rows is None:
            return moved(self._collate(self._items(ids.tolist())), self._device, self._dtype)
        index = torch.from_numpy(np.searchsorted(self._rows, ids)).to(self._device)
        return tree_map(lambda leaf: leaf[index], self._stack)


def changed_examples(run: Run, data: Readable, ids: np.ndarray) -> list[str]:
    """Which examples are not the ones that were trained on, in words; empty where the run has no fingerprints to compare."""
    if run.fingerprint is None:
        return []
    try:
        wrong = [int(i) for i in ids if fingerprint(data[int(i)]) != run.fingerprint[i]]
    except (IndexError, KeyError) as error:
        raise ReplayError(
            "the data lacks an example of the run", expected=f"ids up to {ids.max()}", got=repr(error), do="give the data of the training"
        ) from error
    if not wrong:
        return []
    some = ", ".join(map(str, wrong[:5])) + (" …" if len(wrong) > 5 else "")
    return [f"the data is not the data of the training: {len(wrong)} of {len(ids)} examples differ (input or label): {some}"]
