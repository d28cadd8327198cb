"""Parameters moved between steps, runs and fresh models. Parameters are plain values here: {name: array}."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from explaind.analysis.curves import evaluated
from explaind.analysis.table import Table
from explaind.errors import RequestError
from explaind.kernel.groups import grouping
from explaind.ledger.by_name import task_of
from explaind.replay.functional import fitted
from explaind.store.reader import Run, open_run
from explaind.tasks.task import Grouped, Task

Theta = Mapping[str, np.ndarray]
"""Parameters by name, in their own shapes."""


def layers_named(run: Run, task: Task, wanted: Sequence[str]) -> tuple[str, ...]:
    """Parameter tensors by name, by pattern such as "heads.*", by module, or by the name of one of the task's
    groups; in the model's order.

    RequestError for one that matches nothing.
    """
    groups = task.layer_groups() if isinstance(task, Grouped) else {}
    names = [layer.name for layer in run.manifest.layers]
    modules = {name.rpartition(".")[0] for name in names}
    patterns = [pattern for want in wanted for pattern in groups.get(want, (f"{want}.*" if want in modules else want,))]
    found = grouping("layer", {"chosen": patterns}, names)
    return tuple(name for name, group in zip(names, found.of, strict=True) if group == 0)


def grafted(host: Theta, donor: Theta, layers: Sequence[str]) -> dict[str, np.ndarray]:
    """The host's parameters with these layers from the donor; copies, in the host's order. RequestError for a layer that does not fit."""
    for name in layers:
        if name not in host or name not in donor:
            side = "donor" if name in host else "host"
            raise RequestError(f"the {side} has no such layer", where=name, got=", ".join(list(host)[:3]), do="name layers of both")
        if host[name].shape != donor[name].shape:
            raise RequestError(
                "the donor's layer has another shape", where=name, expected=host[name].shape, got=donor[name].shape, do="take a like model"
            )
    return {name: np.array(donor[name] if name in set(layers) else values) for name, values in host.items()}


def shuffled(theta: Theta, seed: int) -> dict[str, np.ndarray]:
    """Every tensor with its entries in an order of their own: the same values and norms, and nothing that was learned."""
    generator = np.random.default_rng(seed)
    return {name: generator.permutation(values.reshape(-1)).reshape(values.shape) for name, values in theta.items()}


def drawn(run: Run, task: Task, how: str, seed: int) -> dict[str, np.ndarray]:
    """Fresh parameters: "init", as the task's model draws them, or "normal:SCALE", SCALE times a standard normal. The seed comes first."""
    names = [layer.name for layer in run.manifest.layers]
    kind, _, scale = how.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if how == "init":
            own = dict(task.model().named_parameters())
            return {name: own[name].detach().numpy().copy() for name in names}
        if kind == "normal" and _number(scale):
            return {layer.name: (float(scale) * torch.randn(layer.shape)).numpy() for layer in run.manifest.layers}
    raise RequestError("unknown way to draw parameters", expected="init, or normal:SCALE such as normal:0.1", got=repr(how))


def parameters_at(run: Run, task: Task, where: str, seed: int) -> dict[str, np.ndarray]:
    """The parameters that a few words name: a STEP of the run, "last", "init", "normal:SCALE", or another RUN or RUN@STEP.

    RequestError, or StoreError, for what is not there.
    """
    if _is_drawn(where):
        return drawn(run, task, where, seed)
    other, step = _state(run, where)
    theta = other.theta(step)
    for layer in run.manifest.layers:
        got = theta[layer.name].shape if layer.name in theta else f"only {', '.join(list(theta)[:3])}"
        if got != layer.shape:
            raise RequestError(
                "the other run has another model", where=other.path, expected=f"{layer.name} {layer.shape}", got=got, do="take a like run"
            )
    return {layer.name: theta[layer.name] for layer in run.manifest.layers}


def stated(run: Run, where: str) -> str:
    """The words of ``parameters_at``, but another run by its identity: the same however its path is spelled."""
    if _is_drawn(where):
        return where
    other, step = _state(run, where)
    return where if other is run else f"{other.identity}@{step}"


def identities(run: Run, steps: Sequence[int], layers: Sequence[str]) -> Table:
    """The control that needs no training: one row a step, each true only where it holds bitwise.

    self   the layers of a step put into that step change nothing
    whole  all layers of a step put into the last one are that step
    rest   with these layers of a step put into the last one, those are the step's and the others the last one's
    """
    last, rows = run.theta(run.steps), list[tuple[bool, ...]]()
    for step in steps:
        donor = run.theta(step)
        made = grafted(last, donor, layers)
        mixed = {name: (donor if name in layers else last)[name] for name in last}
        pairs = (grafted(donor, donor, layers), donor), (grafted(last, donor, tuple(last)), donor), (made, mixed)
        rows.append(tuple(_identical(one, two) for one, two in pairs))
    columns = dict(zip(("self", "whole", "rest"), np.array(rows, dtype=bool).reshape(-1, 3).T, strict=True))
    formula = f"bitwise identity of parameters; layers: {', '.join(layers)}"
    return Table("identities", formula, "explaind", {"step": np.array(steps, dtype=np.int64), **columns})


def _identical(one: Theta, two: Theta) -> bool:
    return list(one) == list(two) and all(one[n].shape == two[n].shape and one[n].tobytes() == two[n].tobytes() for n in one)


def divergence(one: torch.Tensor, two: torch.Tensor) -> float:
    """KL(one ‖ two), in nats, mean over queries, of log-probabilities [query, output]."""
    return float((one.exp() * (one - two)).sum(-1).mean())


class Bench:
    """A task's model with parameters put in, and what it then does on both splits."""

    def __init__(self, run: Run, task: Task | None = None) -> None:
        self.run, self.task = run, task_of(run) if task is None else task
        self.model = fitted(self.task.model(), run.manifest.layers, run.constants).eval()
        data = {split: self.task.data(split) for split in ("train", "val")}
        self.batches: dict[str, Any] = {split: default_collate([d[i] for i in range(len(d))]) for split, d in data.items()}

    def on(self, device: torch.device) -> dict[str, Any]:
        """The batches, where they are wanted."""
        return {
            split: tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, batch)
            for split, batch in self.batches.items()
        }

    def put(self, theta: Theta) -> nn.Module:
        """The model with these parameters, in eval mode."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, values in theta.items():
                parameters[name].copy_(torch.from_numpy(np.ascontiguousarray(values)))
        return self.model.eval()

    def measured(self, theta: Theta) -> dict[str, float]:
        """Mean loss and accuracy of each split."""
        return self.of(self.put(theta))

    def of(self, model: nn.Module) -> dict[str, float]:
        """The same of any model of the task, in eval mode; its modes are put back."""
        modes, found = [module.training for module in model.modules()], dict[str, float]()
        model.eval()
        with torch.no_grad():
            for split, batch in self.on(next(model.parameters()).device).items():
                found[f"{split}_loss"], found[f"{split}_accuracy"] = evaluated(self.task, model, batch)
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
        return found

    def log_probabilities(self, theta: Theta, split: str = "val") -> torch.Tensor:
        """Float64[query, output]; RequestError where the task has no such measure."""
        measures = self.task.measures()
        if "log_probabilities" not in measures:
            raise RequestError("the task gives no log-probabilities", expected="a measure log_probabilities", got=", ".join(measures))
        with torch.no_grad():
            return measures["log_probabilities"](self.put(theta), self.batches[split]).double()

    def divergence(self, theta: Theta, other: Theta, split: str = "val") -> float:
        """KL(theta ‖ other) of the predictions, mean over a split, in nats."""
        return divergence(self.log_probabilities(theta, split), self.log_probabilities(other, split))

    def confusion(self, theta: Theta, split: str = "val") -> np.ndarray:
        """How often each true class is taken for each class: [true, predicted]."""
        classes = len(self.task.outputs())
        with torch.no_grad():
            predicted = self.task.predict(self.put(theta), self.batches[split]).numpy()
        found = np.zeros((classes, classes), dtype=np.int64)
        np.add.at(found, (self.task.target(self.batches[split]).numpy(), predicted), 1)
        return found


def _is_drawn(where: str) -> bool:
    return where == "init" or where.startswith("normal:")


def _state(run: Run, where: str) -> tuple[Run, int]:
    """The run, or another one, and the step in it; −1 for what is no step."""
    path, at, step = where.rpartition("@")
    at = "" if "://" in where and not (step == "last" or step.isdecimal()) else at  # another one belongs to the URL
    if not at and (where == "last" or where.isdecimal()):
        return run, run.steps if where == "last" else int(where)
    other = open_run(path if at else where)
    return other, other.steps if not at or step == "last" else int(step) if step.isdecimal() else -1


def _number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False
