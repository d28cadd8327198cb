"""Gradients of single examples made of the training's losses: for models of which hooks do not see all, and to check what they see.

The losses of the batch are computed once more, by a copy of the model, in the mode and the random state of the training's own pass, and
differentiated example by example. So examples that are coupled through their batch (BatchNorm, contrastive losses) have the gradient
that a replay of the run gives them.
"""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from explaind.errors import RecordError
from explaind.record.examples import MapStyle
from explaind.record.incoming import MicroBatch
from explaind.record.per_example import checked
from explaind.record.watched import Watched

AT_ONCE = 16
"""Examples that are differentiated in one call of autograd. Where their losses do not depend on the rest of the batch, they are computed of
these alone, for otherwise each of them goes back through the whole batch."""


def copied(model: nn.Module) -> nn.Module:
    """A model of one's own, without the hooks of the user's, which may belong to anything; only those that make its weights come along."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, hooks in vars(module).items():
            if name.endswith("_hooks") and isinstance(hooks, Mapping):
                kept = {key: hook for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils.")}
                memo[id(hooks)] = OrderedDict(kept)
    try:
        own = copy.deepcopy(model, memo)
    except Exception as error:  # whatever the user's modules raise
        raise RecordError(
            "the model cannot be copied", got=f"{type(error).__name__}: {error}"[:200], do="record with gradients='recompute'"
        ) from error
    own.__dict__.pop("forward", None)  # what a library puts around a forward pass calls the one of the user's model
    return own


@contextmanager
def drawn_from(state: Tensor, device: torch.device) -> Iterator[None]:
    """Random generators in a recorded state, and back in their own afterwards."""
    host = len(torch.get_rng_state())
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[:host])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[host:], device)
        yield


def taken(batch: Any, rows: slice, count: int) -> Any:
    """Some rows of a batch with so many."""
    return tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) and leaf.shape[:1] == (count,) else leaf, batch)


def _alike(values: Tensor, others: Tensor) -> bool:
    """Whether two ways to compute losses are one but for rounding."""
    if values.shape != others.shape:
        return False
    room = 64 * torch.finfo(others.dtype).eps
    return bool((values - others).abs().max() <= room * (1.0 + others.abs().max()))


class Recomputed:
    """Differentiates the losses of a micro-batch; the user's model and generators are left as they are."""

    def __init__(self, watched: Watched, losses: Callable[[Any, Any], Tensor], data: MapStyle[Any]) -> None:
        self._watched, self._losses, self._data = watched, losses, data
        self._copy = copied(watched.model)
        named = {**dict(self._copy.named_parameters()), **dict(self._copy.named_buffers())}
        self._params = {named[layer.name]: slice(layer.offset, layer.offset + layer.size) for layer in watched.layers}

    def __call__(self, batch: MicroBatch, some: slice = slice(None)) -> Tensor:
        """∇ℓ_i of some examples of a micro-batch, before the step is made: [example, param]; RecordError where that fails."""
        try:
            return self._computed(batch, some)
        except Exception as error:  # whatever the user's data and losses raise
            raise RecordError(
                "the losses of the examples cannot be computed once more",
                got=f"{type(error).__name__}: {error}"[:300],
                do="give losses= and data= as for explaind.decompose",
            ) from error

    def _computed(self, batch: MicroBatch, some: slice) -> Tensor:
        self._follow()
        device, examples = self._watched.device, range(len(batch.ids))[some]
        into = torch.zeros(len(examples), self._watched.params_count, dtype=self._watched.dtype, device=device)
        with drawn_from(batch.random, device), torch.enable_grad():
            made = default_collate([self._data[int(i)] for i in batch.ids])
            made = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, made)
            whole, apart = checked(self._losses(self._copy, made), len(batch.ids)), batch.drew is False
            for start in range(0, len(examples), AT_ONCE):
                rows = slice(examples[start], examples[start : start + AT_ONCE][-1] + 1)
                values = self._losses(self._copy, taken(made, rows, len(batch.ids))) if apart else whole
                apart = apart and _alike(values, whole[rows])
                values, own = (values, slice(None)) if apart else (whole, rows)
                alone = torch.eye(len(values), dtype=values.dtype, device=device)[own]
                self._add(into[start : start + AT_ONCE], values, alone)
        return into

    def _follow(self) -> None:
        """Bring the copy to where the model is."""
        model = self._watched.model
        own = (*self._copy.parameters(), *self._copy.buffers())
        with torch.no_grad():
            for mine, theirs in zip(own, (*model.parameters(), *model.buffers()), strict=True):
                mine.copy_(theirs)
        for p, live in zip(self._copy.parameters(), model.parameters(), strict=True):
            p.requires_grad_(live.requires_grad)
        for module, other in zip(self._copy.modules(), model.modules(), strict=True):
            module.training = other.training

    def _add(self, into: Tensor, values: Tensor, combinations: Tensor) -> None:
        """into[row, param] += the gradient of every combination [row, example] of the losses."""
        moving = [p for p in self._params if p.requires_grad]
        for rows, found in _gradients(values, moving, combinations):
            for p, g in zip(moving, found, strict=True):
                if g is not None:
                    into[rows, self._params[p]] += g.reshape(-1, p.numel())


def _gradients(values: Tensor, params: list[Tensor], combinations: Tensor) -> Iterator[tuple[slice, tuple[Tensor | None, ...]]]:
    """Gradients of combinations of values, many at once where torch can: (which of them, by parameter [row, *shape])."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations that are taken one by one
            found = torch.autograd.grad(values, params, combinations, retain_graph=True, allow_unused=True, is_grads_batched=True)
    except RuntimeError:
        for row, one in enumerate(combinations):
            yield slice(row, row + 1), torch.autograd.grad(values, params, one, retain_graph=True, allow_unused=True)
    else:
        yield slice(None), found
