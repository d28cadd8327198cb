"""Training a task as a configuration says, recorded step by step. A plain loop, as a user would write it."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from explaind.config import Config, Named, checked, nearest
from explaind.errors import ConfigError
from explaind.record.device import placed
from explaind.record.recorder import record
from explaind.rules import RULES
from explaind.rules.gradient_filter import GRADIENT_FILTERS, GradientFilter, Passage
from explaind.store.location import Where
from explaind.tasks.task import Split, Task

Progress = Callable[[int, int], None]
"""(steps done, steps in all)."""


def train(task: Task, config: Config, path: Where, overwrite: bool = False, progress: Progress | None = None) -> nn.Module:
    """Train the task's model from its seed and record the run at `path`; the trained model.

    Raises ConfigError for settings that make no sense, RecordError for a training that breaks, StoreError for the path.
    """
    _check(config, len(task.data("train")))
    torch.manual_seed(config.train.seed)
    model = task.model()
    fit(task, config, model, path, overwrite, progress)
    return model


def fit(
    task: Task,
    config: Config,
    model: nn.Module,
    path: Where | None,
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: Callable[[int, nn.Module], bool] = lambda steps, model: False,
) -> int:
    """Train a model from the parameters that it has, as a configuration says, with a fresh optimizer; the steps taken.

    path  of the recording; None: nothing is recorded
    stop  (steps taken, model) -> whether that is enough; asked after every step

    Raises as ``train``.
    """
    settings = config.train
    data = task.data("train")
    _check(config, len(data))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = placed(settings.device)
    model.to(device)
    optimizer = make_optimizer(config.optimizer, model)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, settings.warmup)))
    reduce = torch.mean if settings.reduction == "mean" else torch.sum
    filtering = None if config.gradient_filter is None else Filtered(make_gradient_filter(config.gradient_filter), model)
    batches = _batches(data, settings.batch, settings.seed, device)
    recording: Any = nullcontext()
    if path is not None:
        recording = record(
            optimizer,
            model,
            path,
            reduction=settings.reduction,
            data=data,
            config=config.to_json(),
            overwrite=overwrite,
            gradient_filter=None if filtering is None else filtering.told,
            codec=settings.codec,
            thin=f"sqrt:{settings.steps}" if settings.thin == "sqrt" else settings.thin or None,
            gradients=f"store:{settings.steps}" if settings.gradients == "store" else "recompute",
            gradient_dtype=settings.gradient_dtype or None,
            gradient_budget=settings.gradient_budget,
            losses=task.losses,
        )
    with recording as recorder:
        for done in range(1, settings.steps + 1):
            ids, batch = next(batches)
            if recorder is not None:
                recorder.examples(ids)
            optimizer.zero_grad()
            reduce(task.losses(model, batch)).backward()
            if filtering is not None:
                filtering()
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(done, settings.steps)
            if stop(done, model):
                return done
    return settings.steps


def make_optimizer(named: Named, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of that name over all parameters of the model; ConfigError names a wrong name, option or value."""
    if named.name not in RULES:
        raise ConfigError("unknown optimizer", where="optimizer.name", expected=nearest(named.name, RULES), got=repr(named.name))
    kind = RULES[named.name].optimizer
    known = [name for name in inspect.signature(kind).parameters if name != "params"]
    for option in named.options:
        if option not in known:
            raise ConfigError("unknown option", where=f"optimizer {named.name}", expected=nearest(option, known), got=repr(option))
    try:
        return kind(model.parameters(), **named.options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            "the optimizer refuses its options", where=f"optimizer {named.name}", got=error, do="correct the value"
        ) from error


def make_gradient_filter(named: Named) -> GradientFilter:
    """The gradient filter of that name; ConfigError names a wrong name or option."""
    if named.name not in GRADIENT_FILTERS:
        expected = nearest(named.name, GRADIENT_FILTERS)
        raise ConfigError("unknown gradient filter", where="gradient_filter.name", expected=expected, got=repr(named.name))
    return checked(GRADIENT_FILTERS[named.name], named.options, "gradient_filter")


class Filtered:
    """A gradient filter at work on the parameters of a model: call it between the backward pass and the step."""

    def __init__(self, told: GradientFilter, model: nn.Module) -> None:
        self.told, self._params = told, list(model.parameters())
        self._state = [torch.zeros(told.slots, p.numel(), dtype=p.dtype, device=p.device) for p in self._params]
        self._seen = [0] * len(self._params)

    def __call__(self) -> None:
        for i, p in enumerate(self._params):
            if p.grad is None:
                continue
            passage = Passage(*self.told.coefficients(self._seen[i]))
            self._state[i], passed = passage.advance(self._state[i], p.grad.reshape(-1))
            p.grad.copy_(passed.reshape(p.shape))
            self._seen[i] += 1


def _check(config: Config, examples: int) -> None:
    for key, value, most in (
        ("steps", config.train.steps, None),
        ("batch", config.train.batch, examples),
        ("warmup", config.train.warmup, None),
    ):
        least = 1 if key == "steps" else 0
        if value < least or (most is not None and value > most):
            wanted = f"at least {least}" + ("" if most is None else f" and at most the {most} training examples")
            raise ConfigError("out of range", where=f"train.{key}", expected=wanted, got=value)


def _batches(data: Split, size: int, seed: int, device: torch.device) -> Iterator[tuple[Tensor, object]]:
    """(ids, batch) for ever: all examples in order where size is 0, else epochs in an order of their own that `seed` draws."""

    def batch(ids: Tensor) -> object:
        return tree_map(
            lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, default_collate([data[i] for i in ids.tolist()])
        )

    everything = torch.arange(len(data))
    if not size:
        whole = batch(everything)
        while True:
            yield everything, whole
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data), generator=generator)
        for start in range(0, len(data) - size + 1, size):
            ids = order[start : start + size]
            yield ids, batch(ids)
