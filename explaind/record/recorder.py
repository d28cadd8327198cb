"""Watching a training through step hooks on the user's own optimizer, which stays the same object and is never altered."""

import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor, nn

from explaind.errors import RecordError
from explaind.record.examples import MapStyle, checked_ids, checked_weights, fingerprints
from explaind.record.watched import Watched, model_name
from explaind.rules import rule_of
from explaind.store import schema
from explaind.store.manifest import Manifest
from explaind.store.writer import RunWriter, StepRow

BUFFER_BYTES = 256 << 20
"""Most memory that buffered steps may take before they go to disk."""


class Recorder:
    """Made by ``explaind.record``; records every ``optimizer.step()`` until it is closed."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        path: Path,
        reduction: str,
        data: MapStyle[Any] | None,
        config: Mapping[str, Any] | None,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise RecordError(
                "unknown reduction of the training loss",
                expected="'mean' or 'sum'",
                got=repr(reduction),
                do="give other weights to recorder.examples",
            )
        self.path, self._reduction, self._config = path, reduction, config
        self._optimizer, self._rule = optimizer, rule_of(optimizer)
        self._watched = Watched(optimizer, model, self._rule)
        self._examples = None if data is None else len(data)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._fault: str | None = None
        self._theta = self._watched.theta()
        self._rng = self._watched.random()
        block = max(1, min(16, BUFFER_BYTES // max(1, 2 * self._theta.nbytes)))
        self._writer = RunWriter(
            path,
            self._manifest(block),
            self._theta,
            self._watched.constants(),
            None if data is None else fingerprints(data),
            momentum=self._rule.momentum is not None,
            preconditioner=self._watched.preconditioned,
        )
        self._hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    @property
    def steps(self) -> int:
        """Steps recorded so far."""
        return self._writer.steps

    def examples(self, ids: Tensor | np.ndarray | Sequence[int], weights: Tensor | np.ndarray | Sequence[float] | None = None) -> None:
        """Say whose gradient the next step consumes: ids [batch], once per micro-batch, before its forward pass.

        weights [batch] are the factors on the examples' losses where the recorder's reduction does not give them
        ("mean": 1 / batch, "sum": 1).
        """
        self._refuse_if_over()
        try:
            checked = checked_ids(ids, self._examples)
            self._pending.append((checked, checked_weights(weights, self._reduction, len(checked))))
        except RecordError as error:
            raise self._fail(error) from None
        self._rng = self._watched.random()

    def close(self) -> None:
        """Write what is left and let go of the optimizer; safe to call twice."""
        for hook in self._hooks:
            hook.remove()
        self._writer.close(complete=self._fault is None)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None and self._fault is None:
            self._fault = f"the training stopped with {kind.__name__}"
        self.close()

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._refuse_if_over()
        try:
            if not self._pending:
                raise RecordError(
                    "the optimizer stepped, but nobody said on whose gradient",
                    where=f"step {self.steps}",
                    do="call recorder.examples(ids) before each forward pass",
                )
            self._watched.check_unchanged(self._theta, self.steps)
            closure = args[0] if args else kwargs.get("closure")
            if closure is None:
                self._watched.check_gradients(self.steps)
            first = self.steps % self._writer.manifest.block == 0
            self._ages = self._watched.ages()
            self._anchor = self._watched.momentum() if first else None
        except RecordError as error:
            raise self._fail(error) from None

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._watched.check_gradients(self.steps)
            self._check_random()
            ids, weights = (np.concatenate([p[i] for p in self._pending]) for i in (0, 1))
            part = np.repeat(np.arange(len(self._pending), dtype=np.int32), [len(p[0]) for p in self._pending])
            self._theta = self._watched.theta()
            row = StepRow(
                ids,
                part,
                weights,
                self._watched.hyper(),
                self._watched.active(self._ages),
                self._watched.mode(),
                self._watched.preconditioner(),
                self._anchor,
            )
        except RecordError as error:
            raise self._fail(error) from None
        self._pending = []
        self._writer.add(row, self._theta)

    def _check_random(self) -> None:
        # Dropout masks can only be replayed where their random state is kept, which this version does not do.
        if not torch.equal(self._rng, self._watched.random()):
            raise RecordError(
                "random numbers were drawn between recorder.examples and the step, so that its gradient cannot be replayed",
                where=f"step {self.steps}",
                do="set dropout to 0, and augment before calling recorder.examples",
            )

    def _refuse_if_over(self) -> None:
        if self._fault is not None or self._writer.closed:
            raise RecordError(
                "this recording is over", where=self.path, got=self._fault or "closed", do="start another with explaind.record"
            )

    def _fail(self, error: RecordError) -> RecordError:
        """Keep what was recorded, stop recording, and hand the error back to be raised."""
        self._fault = str(error)
        self.close()
        return error

    def _manifest(self, block: int) -> Manifest:
        flags = [
            {k: v for k, v in g.items() if k in ("foreach", "fused", "capturable") and v is not None} for g in self._optimizer.param_groups
        ]
        return Manifest(
            rule=self._rule.optimizer.__name__,
            optimizer=f"{type(self._optimizer).__module__}.{type(self._optimizer).__qualname__}",
            flags={str(i): f for i, f in enumerate(flags)},
            options=self._rule.options,
            layers=self._watched.layers,
            dtype=str(self._theta.dtype),
            block=block,
            reduction=self._reduction,
            model=model_name(self._watched.model),
            modules=self._watched.modules,
            examples=self._examples,
            seed=torch.initial_seed(),
            threads=torch.get_num_threads(),
            device=str(self._watched.device),
            config=self._config,
            versions={"torch": torch.__version__, "numpy": np.__version__, "zarr": zarr.__version__, "python": platform.python_version()},
        )


def record(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    reduction: str = "mean",
    data: MapStyle[Any] | None = None,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Recorder:
    """Record every step of a training to a run folder; use as a context manager, or call ``close()`` at the end.

    optimizer, model  the user's own objects; the training is bitwise the one without a recorder
    path              a new or empty folder (overwrite=True removes a run that is there)
    reduction         how the training loss reduces a batch: "mean" or "sum"
    data              optional: the training data; ids are then range-checked and each example's fingerprint is stored
    config            optional: a JSON-able mapping that is kept with the run

    Raises RuleError for an optimizer without a rule, RecordError for parameters that cannot be recorded, StoreError for the path.
    """
    folder = Path(path)
    if overwrite and folder.exists():
        schema.open_group(folder, "run")  # only ever remove what is a run
        shutil.rmtree(folder)
    return Recorder(optimizer, model, folder, reduction, data, config)
