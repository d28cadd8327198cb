"""Example gradients on their way into a run: asked for, held against a budget, made, and checked at every step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind.config import bytes_of
from explaind.errors import RecordError
from explaind.record.adding_up import Rounding, check_sum, same_gradients, scale_of
from explaind.record.examples import MapStyle
from explaind.record.incoming import Incoming, MicroBatch
from explaind.record.probing import Probe
from explaind.record.recomputing import Recomputed
from explaind.record.tapping import Taps, uncovered
from explaind.record.watched import Watched
from explaind.store.manifest import FLOATS

BUDGET = "8GiB"
"""Bytes that the gradients of a run may take, unless told otherwise."""
COMPARED = 4
"""Examples of which the gradients that hooks see are held against the losses."""
Losses = Callable[[Any, Any], Tensor]
"""(model, batch) -> Tensor[batch]"""


@dataclass(frozen=True)
class Wanted:
    """What ``explaind.record`` was asked to store."""

    dtype: str | None
    budget: int
    steps: int | None
    """To come, where it was told."""
    losses: Losses | None
    compiled: bool
    """Whether the model is, so that hooks on it may not be called."""


def wanted(
    gradients: str,
    dtype: str | torch.dtype | None,
    budget: str | int,
    losses: Losses | None,
    compiled: bool = False,
    **others: object,
) -> Wanted | None:
    """None where gradients are to be recomputed; RecordError for words that mean nothing, and for arguments that do not go together."""
    kind, colon, number = str(gradients).partition(":")
    if kind not in ("recompute", "store") or (colon and (kind, number.isdecimal()) != ("store", True)):
        raise RecordError(
            "unknown way to have example gradients",
            expected="'recompute', 'store', or 'store:STEPS' with the number of steps to come",
            got=repr(gradients),
            do="choose one of these",
        )
    if kind == "recompute":
        if dtype is not None:
            raise RecordError("gradient_dtype is of gradients that are stored", got=f"gradients={gradients!r}", do="give gradients='store'")
        return None
    for name, what in REFUSED.items():
        if others.get(name):
            raise RecordError(f"example gradients cannot be stored {what}", do="record without gradients='store'")
    kept = None if dtype is None else str(dtype).removeprefix("torch.")
    if kept not in (None, *FLOATS):
        raise RecordError(
            "example gradients cannot be stored in this dtype", expected=" or ".join(FLOATS), got=kept, do="choose one that zarr has"
        )
    return Wanted(kept, bytes_of(budget, "gradient_budget"), int(number) if number else None, losses, compiled)


REFUSED = {
    "thin": "in a thin run (thin=), whose steps are lived again with the data anyway",
    "gradient_filter": "in front of a gradient filter (gradient_filter=)",
    "processes": "by several processes",
}
"""Arguments of ``explaind.record`` that do not go with it."""


class Storing:
    """Makes the gradients of every step's examples, and holds their sum against what the optimizer consumed."""

    def __init__(self, asked: Wanted, watched: Watched, data: MapStyle[Any] | None) -> None:
        """RecordError names what hooks cannot see, where there are no losses to compute it from."""
        self._asked, self._watched = asked, watched
        self._like = torch.zeros(watched.params_count, dtype=watched.dtype, device=watched.device)
        self.dtype = asked.dtype or str(watched.dtype).removeprefix("torch.")
        self._kind: torch.dtype = getattr(torch, self.dtype)
        self._recomputed = self._of_losses(asked.losses, data)
        self._hidden = "the model (compiled)" if asked.compiled else uncovered(watched.model, watched.params)
        if self._hidden is not None and self._recomputed is None:
            raise RecordError(
                "the gradients of single examples cannot be seen by hooks",
                where=self._hidden,
                expected="linear maps, convolutions, embeddings, layer, group and RMS normalisations",
                do="give losses= and data=, of which they are made then, or record with gradients='recompute'",
            )
        self._taps: Taps | None = None
        self._probe: Probe | None = None
        self._known = set[tuple[bool, ...]]()
        self._written = 0
        self._made: Tensor | None = None
        self._made_of, self._scale = list[MicroBatch](), 1.0
        self.begin_step(closure=False)

    def watch(self, incoming: Incoming, examples: int, steps: int | None) -> None:
        """Watch the model; examples: whose gradients the run has already; steps: to come, where windows of them are recorded."""
        self._to_come = self._asked.steps if self._asked.steps is not None else steps
        self._written = examples * self._watched.params_count * self._kind.itemsize
        self._incoming = incoming

        def current() -> MicroBatch | None:
            return incoming.pending[-1] if incoming.pending else None

        if self._hidden is None:
            places = {id(p): slice(a.offset, a.offset + a.size) for p, a in zip(self._watched.params, self._watched.layers, strict=True)}
            self._taps = Taps(self._watched.model, places, self._like, current)
        if self._recomputed is None:
            self._probe = Probe(self._watched.model, self._watched.device, current)

    def _of_losses(self, losses: Losses | None, data: MapStyle[Any] | None) -> Recomputed | None:
        if losses is None:
            return None
        if data is None:
            raise RecordError("losses were given without the data that they are computed of", do="give data= too")
        return Recomputed(self._watched, losses, data)

    def close(self) -> None:
        """Let go of the model."""
        for watching in (self._taps, self._probe):
            if watching is not None:
                watching.close()

    def announce(self, count: int, step: int) -> None:
        """A micro-batch of so many examples is about to come; RecordError where its gradients, or those of all steps, are too many."""
        example = self._watched.params_count * self._kind.itemsize
        known = self._written + example * sum(len(batch.ids) for batch in self._incoming.pending)
        # The first batch stands for all steps to come, whatever a run that goes on has of those before.
        steps, self._to_come = self._to_come or 1, None
        need = known + steps * count * example
        if need <= self._asked.budget:
            return
        many = f"{steps} steps × " if steps > 1 else "one more batch of "
        so_far = f", and {_words(known)} are written" if known else ""
        raise RecordError(
            "the gradients of all examples take more than their budget",
            where=f"step {step}",
            expected=f"at most {_words(self._asked.budget)} (gradient_budget=)",
            got=f"{_words(need)} = {many}{count} examples × {self._watched.params_count} parameters × {self._kind.itemsize} bytes "
            f"({self.dtype}){so_far}",
            do="raise it, take a smaller gradient_dtype, record windows of steps (steps=), or gradients='recompute', also with thin=",
        )

    def begin_step(self, closure: bool) -> None:
        """No optimizer has consumed anything yet; closure: whether the step makes its gradient itself."""
        self._closure, self._held = closure, set[int]()

    def consume(self, taken: Sequence[MicroBatch], optimizer: int, step: int, untouched: bool) -> None:
        """An optimizer is about to consume the gradients of its own parameters; RecordError unless those of the examples sum to them.

        untouched: whether they are what backward passes left. Those of other optimizers may still change: a GradScaler unscales them
        one by one.
        """
        weights = torch.from_numpy(np.concatenate([batch.weights for batch in taken])).to(self._like)
        if self._made is None or self._made_of != list(taken):  # before any optimizer has stepped
            self._made_of = list(taken)
            self._made = self._gradients(taken, optimizer, step)
        elif self._taps is not None:  # with another scale, perhaps
            scale = scale_of(self._watched, optimizer)
            for own in self._cuts(lambda owner: owner == optimizer) if scale != self._scale else ():
                self._made[:, own] *= self._scale / scale
        stored = self._made.to(self._kind).to(self._like.dtype)
        coarse = Rounding(torch.finfo(self._kind).eps, self._precision(taken))
        check_sum(self._watched, optimizer, stored, weights, coarse, untouched, step)
        self._held.add(optimizer)

    def of_step(self) -> np.ndarray | None:
        """The gradients of the examples of the step at hand, as they are stored: [slot, param]; 0 where no optimizer consumed them."""
        made, held = self._made, self._held
        self._made, self._made_of, self._scale = None, [], 1.0
        if made is None:
            return None
        for own in self._cuts(lambda owner: owner not in held):
            made[:, own] = 0
        stored = made.to(self._kind)
        self._written += stored.numel() * self._kind.itemsize
        return stored.cpu().numpy()

    def _cuts(self, chosen: Callable[[int], bool]) -> list[slice]:
        """Where the layers of some optimizers stand in a vector [param]."""
        return [slice(a.offset, a.offset + a.size) for a in self._watched.layers if chosen(a.optimizer)]

    def _gradients(self, taken: Sequence[MicroBatch], optimizer: int, step: int) -> Tensor:
        """∇ℓ_i of every example [slot, param]: what hooks saw, unless the losses say that they do not see it."""
        if self._taps is not None:
            try:
                whole = self._seen(taken, step)
                self._scale = scale_of(self._watched, optimizer)
                whole.div_(self._scale)
                if self._agree(whole, taken):
                    return whole
            except RecordError:
                if self._recomputed is None:
                    raise
            self._taps.close()
            self._taps = None
        assert self._recomputed is not None
        if self._closure:
            raise RecordError("gradients of a step with a closure are not made of its losses", where=f"step {step}", do="step without one")
        return torch.cat([self._recomputed(batch) for batch in taken])

    def _seen(self, taken: Sequence[MicroBatch], step: int) -> Tensor:
        """What hooks saw, without the examples' weights; where a weight is 0 nothing is known, and 0 stands there."""
        assert self._taps is not None
        fault = self._taps.fault
        if any(batch.gradients is None for batch in taken):
            fault = fault or "no backward pass of a micro-batch"
        elif self._probe is not None and any(len(batch.ids) > 1 for batch in taken):
            fault = fault or self._probe.fault
        if fault is not None:
            raise RecordError(
                "the gradients of single examples were not seen",
                where=f"step {step}",
                got=fault,
                do="call recorder.examples(ids) right before the forward pass of these examples, or give losses= and data=",
            )
        weights = [torch.tensor(batch.weights) for batch in taken]
        inverse = [torch.where(w != 0, 1 / w, 0.0).to(self._like)[:, None] for w in weights]
        found = [batch.gradients.mul_(w) for batch, w in zip(taken, inverse, strict=True) if batch.gradients is not None]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _agree(self, seen: Tensor, taken: Sequence[MicroBatch]) -> bool:
        """Whether the losses have the gradients that hooks saw, for some examples; asked once for every mode of the model."""
        mode = self._watched.mode()
        if self._recomputed is None or mode in self._known or self._closure:
            return True
        rows = min(COMPARED, len(taken[0].ids))
        known = torch.from_numpy(taken[0].weights[:rows] != 0).to(seen.device)
        want = self._recomputed(taken[0], slice(0, rows)) * known[:, None]
        coarse = Rounding(0.0, self._precision(taken))
        if not same_gradients(self._watched, seen[:rows], want, coarse):
            return False
        if torch.isfinite(seen[:rows]).all():
            self._known.add(mode)
        return True

    def _precision(self, taken: Sequence[MicroBatch]) -> float:
        """ε of the numbers that the training computed its gradients in."""
        lowest = max(torch.finfo(p.dtype).eps for p in self._watched.params)
        return max(lowest, *(batch.precision for batch in taken))


def _words(size: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1 << 10:
            return f"{size:.3g} {unit}"
        size = size / (1 << 10)  # type: ignore[assignment]
    return f"{size:.4g} TiB"
