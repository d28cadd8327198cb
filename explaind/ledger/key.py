"""What a decomposition is: everything that its numbers follow from, so that parts of two are never put together.

Data are told by their fingerprints. Functions cannot be compared, so that measure and losses are told by their first values at the
beginning of the run; these may differ by rounding, since another processor may compute another part.
"""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from explaind.kernel.layout import Layout
from explaind.record.examples import fingerprint
from explaind.replay.functional import Functional
from explaind.replay.steps import Steps, with_examples

VALUES = 64
"""How many values of a function are kept."""
CLOSE = 1e-3
"""Of the largest of them: how far they may be apart."""


def digest(batch: Any) -> str:
    """Hash of a batch: its structure, and the bytes of its tensors."""
    leaves, structure = tree_flatten(batch)
    whole = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            whole.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            whole.update(leaf.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            whole.update(leaf.tobytes() if isinstance(leaf, np.ndarray) else repr(leaf).encode())
    return whole.hexdigest()


def digest_of_data(data: Any, ids: np.ndarray, recorded: np.ndarray | None) -> str:
    """Hash of the examples with these ids; recorded: all fingerprints of the data, where they are known to hold."""
    found = [fingerprint(data[int(i)]) for i in ids] if recorded is None else recorded[ids]
    return hashlib.sha256(np.array(found, dtype=np.uint32).tobytes()).hexdigest()


def values_of_measure(asking: Functional, layout: Layout, theta: Tensor, batch: Any) -> list[float]:
    """The first values of the measure at θ."""
    with torch.no_grad():
        return _first(asking(layout.split(theta), batch))


def values_of_losses(training: Functional, layout: Layout, steps: Steps) -> list[float]:
    """The losses of the first examples of the run, before its first step."""
    step = with_examples(steps.segments(steps.starts))
    training.set_mode(step.mode)
    with torch.no_grad():
        return _first(training(layout.split(step.theta), step.parts[0].batch))


def versions() -> str:
    """What computes."""
    return f"explaind {version('explaind-ledger')}, torch {torch.__version__}"


def difference(mine: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first name by which two keys differ; None where they are of one decomposition."""
    for name in dict.fromkeys((*mine, *other)):
        if name not in mine or name not in other:
            return name
        if name != "machine" and not _alike(mine[name], other[name]):  # whoever begins says how fast it is, and the others follow
            return name
    return None


def _first(values: Tensor) -> list[float]:
    return [float(v) for v in values.reshape(-1)[:VALUES]]


def _alike(one: Any, two: Any) -> bool:
    """Equal; numbers with a fraction but for rounding."""
    if not (isinstance(one, list) and isinstance(two, list) and one and all(isinstance(v, float) for v in (*one, *two))):
        return bool(one == two)
    return len(one) == len(two) and np.allclose(one, two, rtol=0, atol=CLOSE * np.nan_to_num(np.abs(one), posinf=0).max(), equal_nan=True)
