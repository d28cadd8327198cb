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
from torch.utils.hooks import RemovableHandle

from explaind.errors import RecordError
from explaind.record.examples import MapStyle, checked_ids, checked_weights, fingerprints
from explaind.record.incoming import Incoming, random_state
from explaind.record.resuming import resumed
from explaind.record.unwrapping import unwrapped_model, unwrapped_optimizer
from explaind.record.update import Update
from explaind.record.watched import Watched, model_name
from explaind.store import schema
from explaind.store.manifest import Manifest
from explaind.store.writer import RunWriter

BUFFER_BYTES = 256 << 20
"""Most memory that buffered steps may take before they go to disk."""


class Recorder:
    """Made by ``explaind.record``; records every ``optimizer.step()`` until it is closed."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        model: nn.Module,
        path: Path,
        reduction: str,
        data: MapStyle[Any] | None,
        config: Mapping[str, Any] | None,
        watch: Sequence[str],
        resume: bool = False,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise RecordError(
                "unknown reduction of the training loss",
                expected="'mean' or 'sum'",
                got=repr(reduction),
                do="give other weights to recorder.examples",
            )
        self.path, self._reduction, self._config = path, reduction, config
        self._watched = Watched(optimizers, model, watch)
        self._examples = None if data is None else len(data)
        self._fault: str | None = None
        self._update: Update | None = None
        self._theta = self._watched.theta()
        self._incoming = Incoming(self._watched.params, self._watched.device)
        block = max(1, min(16, BUFFER_BYTES // max(1, 2 * self._theta.nbytes)))
        prints = None if data is None else fingerprints(data)
        if resume:
            self._writer = resumed(path, self._manifest(block), self._watched, self._theta, prints)
        else:
            self._writer = RunWriter(
                path,
                self._manifest(block),
                self._theta,
                self._watched.constants(),
                prints,
                momentum=self._watched.has_momentum,
                preconditioner=self._watched.has_frozen,
            )
        self._hooks = [hook for index, optimizer in enumerate(optimizers) for hook in self._hooked(index, optimizer)]

    @property
    def steps(self) -> int:
        """Steps recorded so far."""
        return self._writer.steps

    def examples(self, ids: Tensor | np.ndarray | Sequence[int], weights: Tensor | np.ndarray | Sequence[float] | None = None) -> None:
        """Say whose gradient the next step consumes: ids [batch], once per micro-batch, before its forward pass.

        weights [batch] are the factors on the examples' losses where the recorder's reduction does not give them
        ("mean": 1 / batch, "sum": 1). A micro-batch whose gradient is thrown away before the step (zeroed, as after a step that a
        GradScaler skips) is not counted.
        """
        self._refuse_if_over()
        try:
            checked = checked_ids(ids, self._examples)
            factors = checked_weights(weights, self._reduction, len(checked))
        except RecordError as error:
            raise self._fail(error) from None
        self._finish()
        self._incoming.add(checked, factors)

    def close(self) -> None:
        """Write what is left and let go of the optimizer; safe to call twice."""
        for hook in self._hooks:
            hook.remove()
        self._incoming.close()
        if self._fault is None:
            self._finish()
        self._writer.close(complete=self._fault is None)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None and self._fault is None:
            self._fault = f"the training stopped with {kind.__name__}"
        self.close()

    def _hooked(self, index: int, optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
        def before(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._before(index, args[1] if len(args) > 1 else kwargs.get("closure"))

        def after(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._after(index, optimizer)

        return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def _before(self, index: int, closure: Any) -> None:
        self._refuse_if_over()
        try:
            if self._update is not None and index in self._update.stepped:
                self._finish()
            if self._update is None:
                self._watched.check_unchanged(self._theta, self.steps)
                self._update = Update(self._watched, self._theta, first=self.steps % self._writer.manifest.block == 0)
            if closure is None:  # with one, the gradient is made during the step
                self._gather(self._update)
        except RecordError as error:
            raise self._fail(error) from None

    def _after(self, index: int, optimizer: torch.optim.Optimizer) -> None:
        update = self._update
        assert update is not None
        if bool(getattr(optimizer, "found_inf", None)):  # a fused optimizer that GradScaler told to skip the step
            self._update = None
            return
        try:
            self._gather(update)
            update.step(index)
        except RecordError as error:
            raise self._fail(error) from None
        if len(update.stepped) == len(self._watched.rules):
            self._finish()

    def _gather(self, update: Update) -> None:
        """Whose gradient the step consumes, once for all its optimizers."""
        if update.taken:
            return
        self._watched.check_gradients(self.steps)
        update.taken = self._incoming.taken()
        if not update.taken:
            raise RecordError(
                "the optimizer stepped, but nobody said on whose gradient",
                where=f"step {self.steps}",
                do="call recorder.examples(ids) before each forward pass",
            )
        update.drew = [self._incoming.drew(batch) for batch in update.taken]
        update.consumed = None if self._incoming.untouched else self._watched.gradient_sizes()

    def _finish(self) -> None:
        """The step is made; optimizers that did not take part left their parameters as they were."""
        update = self._update
        if update is None or not update.stepped:
            return
        self._update = None
        self._theta = self._watched.theta()
        row = update.row()
        self._incoming.clear()
        self._writer.add(row, self._theta)

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
        return Manifest(
            optimizers=self._watched.optimized,
            layers=self._watched.layers,
            dtype=str(self._theta.dtype),
            block=block,
            reduction=self._reduction,
            model=model_name(self._watched.model),
            modules=self._watched.modules,
            examples=self._examples,
            seed=torch.initial_seed(),
            random_bytes=len(random_state(self._watched.device)),
            threads=torch.get_num_threads(),
            device=str(self._watched.device),
            config=self._config,
            versions={"torch": torch.__version__, "numpy": np.__version__, "zarr": zarr.__version__, "python": platform.python_version()},
        )


def record(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    reduction: str = "mean",
    data: MapStyle[Any] | None = None,
    config: Mapping[str, Any] | None = None,
    watch: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
) -> Recorder:
    """Record every step of a training to a run folder; use as a context manager, or call ``close()`` at the end.

    optimizer, model  the user's own objects; the training is bitwise the one without a recorder. What accelerate, torch.compile,
                      DataParallel and DistributedDataParallel put around them is looked through
    optimizer         or several of them, each with parameters of its own: they make a step together
    path              a new or empty folder (overwrite=True removes a run that is there; resume=True goes on with it, at the recorded
                      state that the model is in: load the training's checkpoint first)
    reduction         how the training loss reduces a batch: "mean" or "sum"
    data              optional: the training data; ids are then range-checked and each example's fingerprint is stored
    config            optional: a JSON-able mapping that is kept with the run
    watch             names, or globs, of parameters that the optimizer will be given later (``add_param_group``)

    Raises RuleError for an optimizer without a rule, RecordError for parameters that cannot be recorded, StoreError for the path.
    """
    folder = Path(path)
    if overwrite and folder.exists():
        schema.open_group(folder, "run")  # only ever remove what is a run
        shutil.rmtree(folder)
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    return Recorder(
        [unwrapped_optimizer(o) for o in optimizers],
        unwrapped_model(model),
        folder,
        reduction,
        data,
        config,
        watch,
        resume and folder.exists(),
    )
