"""Accounts and snapshots of a sweep as named arrays, for the disk, and back: bitwise."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind.kernel.accounts import Accounts
from explaind.kernel.costate import Costate
from explaind.kernel.sweep import Snapshot

NOWHERE = -1
"""Stands for the entry of a costate that has none."""


def packed(accounts: Accounts) -> dict[str, np.ndarray]:
    """One array a field."""
    return {f.name: _numbers(getattr(accounts, f.name)) for f in fields(Accounts)}


def unpacked(arrays: Mapping[str, np.ndarray], device: torch.device) -> Accounts:
    """Back from ``packed``."""
    lists = {f.name for f in fields(Accounts) if f.default_factory is list}
    values: dict[str, Any] = {
        f.name: arrays[f.name].tolist() if f.name in lists else tensor(arrays[f.name], device) for f in fields(Accounts)
    }
    return Accounts(**values)


def packed_snapshot(at: Snapshot) -> dict[str, np.ndarray]:
    """The accounts, and beside them what the sweep carries from segment to segment."""
    return {
        **packed(at.accounts),
        "done": np.array(at.done),
        "rule": np.array(at.rule, dtype=np.int64),
        "entry": np.array([NOWHERE if c.entry is None else c.entry for c in at.costates], dtype=np.int64),
        "memory": np.array([c.memory for c in at.costates], dtype=np.float64).reshape(len(at.costates), -1 if at.costates else 0),
        "most": np.array([c.most for c in at.costates]),
        **{f"mu.{i}": _numbers(c.mu) for i, c in enumerate(at.costates)},
        **{f"nu.{i}": _numbers(c.nu) for i, c in enumerate(at.costates) if c.nu is not None},
    }


def unpacked_snapshot(arrays: Mapping[str, np.ndarray], device: torch.device) -> Snapshot:
    """Back from ``packed_snapshot``."""
    places = zip(arrays["entry"].tolist(), arrays["memory"], arrays["most"].tolist(), strict=True)
    nus = {name: tensor(values, device) for name, values in arrays.items() if name.startswith("nu.")}
    return Snapshot(
        int(arrays["done"]),
        unpacked(arrays, device),
        tuple(
            Costate(tensor(arrays[f"mu.{i}"], device), None if entry == NOWHERE else entry, memory, nus.get(f"nu.{i}"), most)
            for i, (entry, memory, most) in enumerate(places)
        ),
        arrays["rule"].tolist(),
    )


def tensor(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy in torch's own memory: numpy aligns its memory otherwise, which may change the order of sums."""
    return torch.tensor(values, device=device)


def _numbers(values: Tensor | list[int]) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, Tensor) else np.array(values)
