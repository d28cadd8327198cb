"""Where the gradients of examples come from: the run, which stored them while it trained, or the data and the losses of the training."""

import torch

from explaind.errors import RequestError
from explaind.kernel.products import ROUTES
from explaind.replay.batches import Readable
from explaind.replay.functional import Readout
from explaind.store.reader import Run

STORED = "stored"
CHOICES = (*ROUTES, STORED)
"""What `products` may be."""
COARSE = 8.0
"""So many roundings of a dtype that is coarser than float32 an update may be off by, whose gradients are stored in it."""


def is_stored(run: Run, products: str) -> bool:
    """Whether a decomposition with these products takes the gradients that the run stores, where it has any."""
    if products == STORED and run.manifest.gradients is None:
        raise RequestError(
            "the run stores no gradients of examples", where=run.path, got=f"products={STORED!r}", do="record it with gradients='store'"
        )
    return run.manifest.gradients is not None and products in ("auto", STORED)


def needed(run: Run, data: Readable | None, losses: Readout | None) -> tuple[Readable, Readout]:
    """Data and losses; RequestError where one of them was not given."""
    if data is not None and losses is not None:
        return data, losses
    raise RequestError(
        "data and losses of the training are needed to compute the gradients of its examples",
        where=run.path,
        expected="data= and losses=",
        got=f"no {'data' if data is None else 'losses'}",
        do="give them; a run that was recorded with gradients='store' needs none, unless products= asks to compute them",
    )


def rounding_of(run: Run, stored: bool) -> list[float]:
    """How far, relative to an update, a replay may be from exact: [layer]."""
    eps = torch.finfo(getattr(torch, run.manifest.gradients)).eps if stored and run.manifest.gradients else 0.0
    return [max(own, COARSE * eps if eps > torch.finfo(torch.float32).eps else 0.0) for own in run.rounding]
