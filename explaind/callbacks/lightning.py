"""Lightning: ``Trainer(callbacks=[RecordCallback(path)])`` with a loader of ``explaind.indexed(data)``."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from explaind.record.examples import ID
from explaind.record.recorder import Recorder, record
from explaind.store.location import Where


def ids_of(batch: Any) -> Any:
    """Where ``explaind.indexed`` puts them."""
    return batch[ID] if isinstance(batch, Mapping) else batch[0]


class RecordCallback(Callback):
    """Records a training of Lightning's Trainer.

    path, **options   as for ``explaind.record``
    ids               the ids [batch] of a batch of the training loader
    weights           batch -> the factor that the training loss puts on each example [batch], where it is another one than 1 / (examples ·
                      accumulate_grad_batches)
    """

    def __init__(
        self,
        path: Where,
        ids: Callable[[Any], Any] = ids_of,
        weights: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        self._path, self._ids, self._weights, self._options = path, ids, weights, options
        self._recorder: Recorder | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        precision = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(trainer.precision))
        self._recorder = record(trainer.optimizers, pl_module, self._path, **{"precision": precision, **self._options})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._recorder is not None
        ids = self._ids(batch)
        usual = np.full(len(ids), 1 / (len(ids) * trainer.accumulate_grad_batches))
        self._recorder.examples(ids, usual if self._weights is None else self._weights(batch))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(exception)

    def _close(self, exception: BaseException | None = None) -> None:
        if self._recorder is not None:
            self._recorder.__exit__(None if exception is None else type(exception), exception, None)
