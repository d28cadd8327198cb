"""Living the steps of a thin run again: from a stored state with the model, the optimizer and the batches of the training.

Every step goes as the training went: the gradient of Σ w_i ℓ_i, one backward pass a micro-batch, in the recorded mode and random state;
what was done to it before the step, read off the recorded sizes; then ``optimizer.step()``. The parameters that it leads to are compared
with their recorded checksum. Where a stretch meets the next stored state, that state is taken, so that an error of arithmetic ends there.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from explaind.errors import ExplaindError, ReplayError
from explaind.record.device import placed
from explaind.record.living import groups_of, put_state
from explaind.record.per_example import checked
from explaind.record.update import Update
from explaind.record.watched import Watched
from explaind.replay.account import Account
from explaind.replay.batches import Batches, Collate, Readable
from explaind.replay.functional import Readout, fitted
from explaind.replay.steps import Drawn
from explaind.replay.surroundings import as_in_training, drawing
from explaind.replay.treated import treated
from explaind.rules import rule_named
from explaind.store.checksums import theta_checksum
from explaind.store.reader import Block, Run
from explaind.store.row import StepRow


class Reliving:
    """Makes the steps of one thin run again, block by block; the user's model is copied, never touched."""

    def __init__(
        self, run: Run, model: nn.Module, losses: Readout, data: Readable, collate: Collate | None, device: torch.device | None = None
    ) -> None:
        """device: where to live, by default the training's, or the host where this machine has no such device."""
        thin, layers = run.manifest.thin or {}, run.manifest.layers
        self.run, self._losses, self.account = run, losses, Account()
        self._kind = rule_named(run.manifest.optimizers[0].rule).optimizer
        self._device = _there(run.manifest.device) if device is None else device
        self._model = fitted(model, layers, run.constants)
        named = dict(self._model.named_parameters())
        for name, kind in (*thin["still"].items(), *((layer.name, k) for layer, k in zip(layers, thin["dtypes"], strict=True))):
            own: Tensor = named[name] if name in named else self._model.get_buffer(name)
            own.data = own.data.to(self._device, getattr(torch, kind))
        self._params = [named[layer.name] for layer in layers]
        for p in named.values():
            p.requires_grad_(any(p is own for own in self._params))
        dtype = self._params[0].dtype
        for p in self._params:
            dtype = torch.promote_types(dtype, p.dtype)
        self._batches = Batches(data, run.examples, collate, self._device, dtype)

    def block(self, block: Block) -> Block:
        """The same steps with the parameters before and after each of them, and what the optimizer's rule needs of them."""
        stop = block.start + len(block.rows)
        self._put(block.theta[0])
        theta, rows = [block.theta[0]], list[StepRow]()
        wanted, exact = self.run.checksums(block.start, stop + 1), list[bool]()
        optimizer = _of_class(self._kind, groups_of(_there_is(block.rows[0].groups), self._params))
        put_state(_there_is(block.rows[0].state), optimizer, self._params)
        with as_in_training(self.run.manifest.threads):
            watched = Watched([optimizer], self._model)
            for i, row in enumerate(block.rows):
                update = Update(watched, first=i == 0)
                self._step(optimizer, row)
                update.step(0)
                theta.append(np.asarray(watched.theta()))
                crc = theta_checksum(theta[-1], self.run.manifest.layers, wanted[i])
                exact.append(bool(np.array_equal(crc, wanted[i + 1])))
                frozen, anchor = (None if vector is None else np.array(vector) for vector in (update.frozen(), update.anchor))
                rows.append(replace(row, preconditioner=frozen, anchor=anchor))
        self._model.zero_grad()
        end = self.run.stored(stop, stop + 1)
        stored = block.theta[-1] if end else None
        self.account.take(block.start, exact, theta[0], theta[-1], stored)
        return Block(block.start, np.stack(theta if stored is None else [*theta[:-1], stored]), tuple(rows), block.modes)

    def _put(self, theta: np.ndarray) -> None:
        with torch.no_grad():
            for p, layer in zip(self._params, self.run.manifest.layers, strict=True):
                p.copy_(torch.from_numpy(theta[layer.offset : layer.offset + layer.size].reshape(layer.shape)))

    def _step(self, optimizer: Optimizer, row: StepRow) -> None:
        """One step of the training."""
        if row.groups is not None:
            optimizer.param_groups[:] = groups_of(row.groups, self._params)
        for module, training in zip(self._model.modules(), row.mode, strict=True):
            module.training = training
        self._model.zero_grad()
        for part in np.unique(row.part).tolist():
            self._backward(row, part)
        for i, (p, age) in enumerate(zip(self._params, row.age.tolist(), strict=True)):
            if age < 0:
                p.grad = None
            else:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = p.grad if row.consumed is None else treated(p.grad, *row.consumed[i].tolist())
        optimizer.step()

    def _backward(self, row: StepRow, part: int) -> None:
        mine, wide = row.part == part, self.run.manifest.random_bytes
        state = None if row.random is None else row.random[part * wide : (part + 1) * wide]
        batch: Any = self._batches(row.batch[mine])
        if state is None or not state.any():
            losses = self._losses(self._model, batch)
        else:
            drawn = Drawn.of(batch, state)
            if len(drawn.states) > 1 and self._device.type == "cpu":
                raise ReplayError(
                    "the training drew random numbers on its device, and this machine has none",
                    expected=self.run.manifest.device,
                    got="cpu",
                    do="live a thin run again where it was recorded",
                )
            with drawing(drawn.states, self._device):
                losses = self._losses(self._model, batch)
        weights = row.weight[mine]
        values = checked(losses, len(weights))
        values.backward(torch.from_numpy(weights).to(values))


def _of_class(kind: type[Optimizer], groups: list[dict[str, Any]]) -> Optimizer:
    """An optimizer with these groups, whose options are complete: its constructor, which checks and fills them in, is not asked."""
    own = kind.__new__(kind)
    Optimizer.__init__(own, groups, {"differentiable": False})  # which torch asks of the defaults
    return own


def _there_is(values: np.ndarray | None) -> np.ndarray:
    if values is None:
        raise ReplayError("a stretch of a thin run begins without a stored state", do="explaind verify says whether the run is damaged")
    return values


def _there(device: str) -> torch.device:
    try:
        return placed(device)
    except ExplaindError:
        return torch.device("cpu")
