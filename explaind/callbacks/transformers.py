"""Hugging Face's Trainer: ``Trainer(…, train_dataset=explaind.indexed(data), callbacks=[RecordCallback(path)])``."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from explaind.errors import RecordError
from explaind.record.examples import ID
from explaind.record.hooks import Hook
from explaind.record.recorder import Recorder, record
from explaind.store.location import Where

Weights = Callable[[np.ndarray, dict[str, Any]], Any]
"""(ids [batch], the model's keyword arguments) -> the factor on each example's loss [batch]."""


class RecordCallback(TrainerCallback):
    """Records the Trainer's training; the training set is an ``explaind.indexed`` one, and ``remove_unused_columns`` is off.

    path, **options   as for ``explaind.record``
    weights           the factor that the training loss puts on each example, where it is another one than the Trainer's, which is
                      1 / (examples of the micro-batch · micro-batches of the step). A model that takes ``num_items_in_batch`` divides by it
                      instead (an example's loss is then the sum over its items), or does not, and has 1 / examples: one batch tells
    """

    def __init__(self, path: Where, weights: Weights | None = None, **options: Any) -> None:
        self._path, self._weights, self._options = path, weights, options
        self._recorder: Recorder | None = None
        self._accumulated = 1
        self._counts: bool | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.remove_unused_columns:
            raise RecordError(
                "the Trainer would take the ids out of its batches",
                expected="TrainingArguments(remove_unused_columns=False)",
                got="True",
                do="set it, and give train_dataset=explaind.indexed(data)",
            )
        model: nn.Module = kwargs["model"]
        precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self._recorder = record(kwargs["optimizer"], model, self._path, **{"precision": precision, **self._options})
        self._hook = model.register_forward_pre_hook(Hook(self._announce), with_kwargs=True)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """How many micro-batches make the step: at the end of an epoch there may be fewer."""
        batches, most = len(kwargs["train_dataloader"]), args.gradient_accumulation_steps
        self._accumulated = min(most, batches - state.global_step % -(-batches // most) * most)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._recorder is not None
        self._hook.remove()
        self._recorder.close()

    def _announce(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take the ids out of a batch on its way into the model."""
        ids, rest = kwargs.get(ID), {key: value for key, value in kwargs.items() if key != ID}
        if ids is not None and model.training and self._recorder is not None:
            known = ids.cpu().numpy()
            factors = np.full(len(known), self._usual(model, len(known), rest)) if self._weights is None else self._weights(known, rest)
            self._recorder.examples(known, factors)
        return args, rest

    def _usual(self, model: nn.Module, examples: int, kwargs: dict[str, Any]) -> float:
        items = kwargs.get("num_items_in_batch")
        if items is None:
            return 1 / (examples * self._accumulated)
        if self._counts is None:
            self._counts = divides(model, kwargs)
        return 1 / float(items) if self._counts else 1 / examples


def divides(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a model's loss is divided by the number of items that it is given; nothing of the training is disturbed."""
    modes = {module: module.training for module in model.modules()}
    model.eval()  # so that nothing is drawn, and no statistic moves
    with torch.no_grad():
        once, twice = (_loss(model.forward(**{**kwargs, "num_items_in_batch": n * kwargs["num_items_in_batch"]})) for n in (1, 2))
    for module, training in modes.items():
        module.training = training
    return abs(once - 2 * twice) < abs(once - twice)


def _loss(output: Any) -> float:
    return float(output["loss"] if isinstance(output, dict) else output[0])
