"""Watching a training through step hooks on the user's own optimizer, which stays the same object and is never altered."""

import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
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
from explaind.record.filtering import Filtering, Remembered
from explaind.record.incoming import Begins, Incoming, MicroBatch, random_state
from explaind.record.ranks import ALONE, Ranks, Writer, ranks_of
from explaind.record.resuming import resumed, stored_examples
from explaind.record.steady import Steady
from explaind.record.storing import BUDGET, Losses, Storing, Wanted, wanted
from explaind.record.thinning import Thinning, check_asked
from explaind.record.unwrapping import unwrapped_model, unwrapped_optimizer
from explaind.record.update import Update, gap_row
from explaind.record.watched import Watched, model_name
from explaind.record.windows import Windows
from explaind.rules.gradient_filter import GradientFilter
from explaind.store import schema
from explaind.store import spool as spools
from explaind.store.checksums import theta_checksum
from explaind.store.location import Location, Where, is_free, location_of, remove_tree
from explaind.store.manifest import Manifest
from explaind.store.row import StepRow
from explaind.store.thin import writer_of

BLOCK_BYTES = 256 << 20
"""Most that the steps of a block may take in the log."""
SPAN_BYTES, TOGETHER = 16 << 20, 32
"""Blocks are written together while they take no more than this in the log, and up to so many: writing has a price a chunk."""


class Recorder:
    """Made by ``explaind.record``; records every ``optimizer.step()`` until it is closed."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        model: nn.Module,
        path: Location,
        reduction: str,
        data: MapStyle[Any] | None,
        config: Mapping[str, Any] | None,
        watch: Sequence[str],
        resume: bool = False,
        gradient_filter: GradientFilter | None = None,
        filtered: Remembered | None = None,
        steps: Sequence[tuple[int, int]] | None = None,
        codec: str = "bitdelta",
        ranks: Ranks = ALONE,
        precision: torch.dtype | None = None,
        thin: int | str | None = None,
        stored: Wanted | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path, self._reduction, self._config = path, reduction, config
        self._watched = Watched(optimizers, model, watch)
        self._filtering = None if gradient_filter is None else Filtering(gradient_filter, self._watched, filtered)
        if steps is not None and gradient_filter is not None:
            raise RecordError("windows of steps cannot be recorded behind a gradient filter", got=gradient_filter, do="record every step")
        asked = {"watch": watch, "steps": steps, "gradient_filter": gradient_filter, "precision": precision, "processes": ranks.size > 1}
        every = check_asked(thin, **asked)
        self._thinning = None if every is None else Thinning(optimizers, model, self._watched.params, self._watched.layers)
        self._windows = Windows(steps, len(optimizers))
        self._examples = None if data is None else len(data)
        self._fault: str | None = None
        self._update: Update | None = None
        """The step that is being made."""
        self._alike: MicroBatch | None = None
        """Of the step that is being made in its place, one like the last."""
        theta = self._watched.theta()
        self._storing = None if stored is None else Storing(stored, self._watched, data)
        self._incoming = Incoming(self._watched.params, self._watched.device, reduced=ranks.size > 1)
        plain = self._storing is self._filtering is self._thinning is None and self._windows.all and ranks.size == 1
        self._steady = Steady(self._watched, self._incoming) if plain and self._watched.steady else None
        # A block begins with what a gradient filter remembers, which may be much.
        wanted = 16 if gradient_filter is None else max(16, gradient_filter.slots)
        step = max(1, 2 * theta.size * theta.dtype.itemsize)
        block = every or max(1, min(wanted, BLOCK_BYTES // step))
        self._together = 1 if every else max(1, min(TOGETHER, SPAN_BYTES // (block * step)))
        prints = None if data is None else fingerprints(data)
        self._ranks = ranks

        def begin() -> tuple[Writer, int]:
            if resume:
                return resumed(path, self._manifest(block), self._watched, np.asarray(theta), prints)
            if overwrite:
                _make_way(path)
            momentum, preconditioner = (every is None and has for has in (self._watched.has_momentum, self._watched.has_frozen))
            manifest, constants = self._manifest(block), self._watched.constants()
            return writer_of(manifest)(path, manifest, theta, constants, prints, momentum, preconditioner, codec), 0

        self._writer, self._windows.number = ranks.led(begin, self._watched.layers)
        nothing = np.zeros(len(self._watched.layers), np.uint32)
        self._sums = nothing, theta_checksum(theta, self._watched.layers, nothing)
        if self._writer.steps and gradient_filter is not None and not filtered:
            self._writer.close(complete=False)
            raise RecordError(
                "the recording goes on behind a gradient filter, and what that remembers is not known",
                where=path,
                do="give what gradfilter_ema or gradfilter_ma returned last: explaind.record(…, filtered=grads)",
            )
        self._told = 0.0 if precision is None else torch.finfo(precision).eps
        self._hooks: list[RemovableHandle] = [hook for index, optimizer in enumerate(optimizers) for hook in self._hooked(index, optimizer)]
        # A library may have put its own forward around the model's, as accelerate does, with autocast inside: its children are in it.
        wrapped = "forward" in vars(self._watched.model)
        for module in (self._watched.model, *(self._watched.model.children() if wrapped else ())):
            self._hooks.append(module.register_forward_pre_hook(Begins(self._incoming)))
        if self._storing is not None:
            self._storing.watch(self._incoming, stored_examples(path) if resume else 0, self._windows.to_come)

    @property
    def steps(self) -> int:
        """Rows recorded so far: steps, and gaps between windows of steps."""
        return self._writer.steps

    def examples(self, ids: Tensor | np.ndarray | Sequence[int], weights: Tensor | np.ndarray | Sequence[float] | None = None) -> None:
        """Say whose gradient the next step consumes: ids [batch], once per micro-batch, before its forward pass.

        weights [batch] are the factors on the examples' losses where the recorder's reduction does not give them
        ("mean": 1 / batch, "sum": 1). A micro-batch whose gradient is thrown away before the step (zeroed, as after a step that a
        GradScaler skips) is not counted.
        """
        if self._fault is not None or self._writer.closed:
            raise self._over()
        try:
            checked = checked_ids(ids, self._examples)
            factors = checked_weights(weights, self._reduction, len(checked))
        except RecordError as error:
            raise self._fail(error) from None
        if self._update is not None:
            self._finish()
        if not self._windows.all:
            self._windows.end()
        if self._windows.all or self._windows.recorded:
            if self._storing is not None:
                self._announce(self._storing, len(checked))
            self._incoming.add(checked, factors, self._told)

    def _announce(self, storing: Storing, count: int) -> None:
        """Refuse examples whose gradients there is no room for, before anything is computed of them."""
        try:
            storing.announce(count, self.steps)
        except RecordError as error:
            raise self._fail(error) from None

    def close(self) -> None:
        """Write what is left and let go of the optimizer; safe to call twice."""
        for hook in self._hooks:
            hook.remove()
        self._incoming.close()
        if self._storing is not None:
            self._storing.close()
        if self._fault is None:
            self._finish()
            self._look_back()
        self._writer.close(complete=self._fault is None)

    def _look_back(self) -> None:
        """Warn where the run does not lead to the model as it is now: another optimizer may have taken over."""
        if self._writer.closed or not self.steps or self._windows.passed:
            return
        try:
            self._watched.check_unchanged(*self._sums, self.steps)
        except RecordError as error:
            warnings.warn(f"the run ends at step {self.steps}, and its last parameters are not the model's: {error}", stacklevel=3)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None and self._fault is None:
            self._fault = f"the training stopped with {kind.__name__}"
        self.close()

    def _hooked(self, index: int, optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
        before, after = partial(self._before, index), partial(self._after, index)
        return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def _before(self, index: int, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if self._fault is not None or self._writer.closed:
            raise self._over()
        try:
            if self._update is not None and index in self._update.stepped:
                self._finish()
            if not (self._windows.all or self._windows.recorded) or _skips(optimizer):
                return
            if self._steady is not None:
                writer, self._alike = self._writer, None
                if closure is None and self._update is None and writer.steps % writer.block:
                    self._alike = self._steady.begin(*self._sums, writer.steps)
                if self._alike is not None:
                    return
            if self._update is None or not self._update.stepped:  # if there is one, it failed: this is made in its place
                self._update = self._begin(closure)
            if closure is None and index not in self._update.checked:  # with one, the gradient is made during the step
                self._gather(self._update, index)
        except RecordError as error:
            raise self._fail(error) from None

    def _begin(self, closure: Any) -> Update:
        """A step is about to be made."""
        behind = self._windows.passed > 0
        if behind and self._update is None:
            self._add(gap_row(self._watched, self._windows.passed, self._first))
        self._watched.check_unchanged(*self._sums, self.steps)
        if self._thinning is not None:
            self._thinning.begin(self._first, closure, self.steps)
        if self._storing is not None:
            self._storing.begin_step(closure is not None)
        return Update(self._watched, self._first or behind, self._filtering)

    def _after(self, index: int, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        update = self._update
        if _skips(optimizer):
            return
        try:
            if self._alike is not None and self._steady is not None:
                row, batch, self._alike = self._steady.made(self._alike), self._alike, None
                if row is not None:
                    self._incoming.clear()
                    self._add(row)
                    return
                update = self._update = self._steady.update(batch)
            if update is None:
                self._windows.stepped(index)
                return
            if index not in update.checked:
                self._gather(update, index)
            update.step(index)
        except RecordError as error:
            raise self._fail(error) from None
        if len(update.stepped) == len(self._watched.rules):
            self._finish()

    def _gather(self, update: Update, index: int) -> None:
        """Look at the gradients that an optimizer consumes."""
        self._watched.check_gradients(index, self.steps)
        update.checked.add(index)
        if self._filtering is None:
            update.look(index, touched=not self._incoming.untouched)
        self._take(update)
        if self._storing is not None:
            self._storing.consume(update.taken, index, self.steps, self._incoming.untouched)

    def _take(self, update: Update) -> None:
        """Whose gradient the step consumes."""
        if update.taken:
            return
        taken = self._incoming.taken()
        update.taken, update.drew = self._ranks.gathered(taken, [self._incoming.drew(batch) for batch in taken], self.steps)
        if not update.taken:
            raise RecordError(
                "the optimizer stepped, but nobody said on whose gradient",
                where=f"step {self.steps}",
                do="call recorder.examples(ids) before each forward pass",
            )
        if self._thinning is not None:
            self._thinning.check(update.taken, self.steps)
        if self._filtering is not None:
            update.filtered = self._filtering.following()

    def _finish(self) -> None:
        """The step is made; optimizers that did not take part left their parameters as they were."""
        update = self._update
        if update is None or not update.stepped:
            return
        self._update = None
        row = update.row(None if self._storing is None else self._storing.of_step())
        if self._filtering is not None:
            self._filtering.take(update.filtered)
        self._windows.taken()
        self._incoming.clear()
        self._add(row if self._thinning is None else self._thinning.thinned(row))
        if self._steady is not None:
            self._steady.know(update, row)
        if update.anchor is not None and not self._first:
            self._watched.forget_momentum()

    def _add(self, row: StepRow) -> None:
        """Hand a row over, with the parameters as they stand, whose checksum is all that is kept of them."""
        before = self._writer.crc_theta
        self._writer.add(row, self._watched.theta())
        self._sums = before, self._writer.crc_theta

    @property
    def _first(self) -> bool:
        """Whether the row to come is the first of a block."""
        return self.steps % self._writer.block == 0

    def _over(self) -> RecordError:
        return RecordError("this recording is over", where=self.path, got=self._fault or "closed", do="start another with explaind.record")

    def _fail(self, error: RecordError) -> RecordError:
        """Keep what was recorded, stop recording, and hand the error back to be raised."""
        self._fault = str(error)
        self.close()
        return error

    def _manifest(self, block: int) -> Manifest:
        return Manifest(
            optimizers=self._watched.optimized,
            layers=self._watched.layers,
            dtype=str(self._watched.dtype).removeprefix("torch."),
            block=block,
            together=self._together,
            reduction=self._reduction,
            model=model_name(self._watched.model),
            modules=self._watched.modules,
            examples=self._examples,
            seed=torch.initial_seed(),
            random_bytes=len(random_state(self._watched.device)),
            threads=torch.get_num_threads(),
            device=str(self._watched.device),
            config=self._config,
            gradient_filter=None if self._filtering is None else self._filtering.told.to_json(),
            thin=None if self._thinning is None else self._thinning.facts,
            gradients=None if self._storing is None else self._storing.dtype,
            filter_seen=() if self._filtering is None else tuple(self._filtering.seen),
            versions={"torch": torch.__version__, "numpy": np.__version__, "zarr": zarr.__version__, "python": platform.python_version()},
        )


def record(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    model: nn.Module,
    path: Where,
    *,
    reduction: str = "mean",
    data: MapStyle[Any] | None = None,
    config: Mapping[str, Any] | None = None,
    watch: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    steps: Sequence[tuple[int, int]] | None = None,
    gradient_filter: GradientFilter | None = None,
    filtered: Remembered | None = None,
    precision: torch.dtype | None = None,
    codec: str = "bitdelta",
    thin: int | str | None = None,
    gradients: str = "recompute",
    gradient_dtype: str | torch.dtype | None = None,
    gradient_budget: str | int = BUDGET,
    losses: Losses | None = None,
    spool: str | os.PathLike[str] | None = None,
) -> Recorder:
    """Record every step of a training to a run folder; use as a context manager, or call ``close()`` at the end.

    optimizer, model  the user's own objects; the training is bitwise the one without a recorder. What accelerate, torch.compile,
                      DataParallel and DistributedDataParallel put around them is looked through: of several processes that train one
                      model, each says whose gradients are its own, and the first one writes
    optimizer         or several of them, each with parameters of its own: they make a step together
    path              a new or empty folder, or a URL such as s3://bucket/run where nothing is (overwrite=True removes a run that is there;
                      resume=True goes on with it, at the recorded state that the model is in: load the training's checkpoint first)
    reduction         how the training loss reduces a batch: "mean" or "sum"
    data              optional: the training data; ids are then range-checked and each example's fingerprint is stored
    config            optional: a JSON-able mapping that is kept with the run
    watch             names, or globs, of parameters that the optimizer will be given later (``add_param_group``)
    steps             windows [(start, stop), …] of the training's steps to record, counted from now; by default all. What happens between
                      two of them is one row of the run, and has a row ``gap`` in the ledger
    gradient_filter   what the loop does to the gradients between the backward pass and the step: ``explaind.GrokfastEMA(alpha, lamb)`` or
                      ``explaind.GrokfastMA(window_size, lamb)``, with the options of ``gradfilter_ema`` and ``gradfilter_ma``
    filtered          what it remembers already (what these functions return), where the training began before the recording
    precision         torch.bfloat16 or torch.float16 where gradients are computed in it (autocast); found by itself where the model, or
                      ``recorder.examples``, is called inside of ``torch.autocast``. The replay runs under it too; what it
                      rounds of a batch's gradient is no example's, and stands in ``arithmetic``
    codec             of parameters, momenta and second moments: "bitdelta", which is lossless and small, or "standard", which is larger and
                      which zarr reads where explaind is not installed; a run that is gone on with keeps its own
    thin              steps between two stored states, or "sqrt:STEPS" for the root of the steps to come: what is between is lived again
                      when it is asked for, in a small part of the room; RecordError names what cannot be
    gradients         "store" puts the gradient of every example of every step into the run, so that ``explaind.decompose`` needs neither
                      data nor losses; "store:STEPS" with the number of steps to come, for the budget; by default "recompute"
    gradient_dtype    of these: torch.float16, float32 or float64; by default that of the parameters
    gradient_budget   bytes that they may take, such as "20GiB"; RecordError before the first batch that does not fit
    losses            (model, batch) -> Tensor[batch], as for ``explaind.decompose``: with `data`, gradients to be stored are made of them
                      where hooks on the model do not see these, and held against them at the first step where they do
    spool             of a run at a URL: a folder of this machine that holds the steps which are not committed there yet, and the lock; by
                      default one in the user's cache. Who resumes or repairs the run names the same

    Raises RuleError for an optimizer without a rule, RecordError for parameters that cannot be recorded, StoreError for the path.
    """
    _check_words(reduction, codec)
    asked = {"thin": thin, "gradient_filter": gradient_filter}
    folder, ranks = location_of(path, spool), ranks_of(model) if isinstance(model, nn.Module) else ALONE
    compiled = hasattr(model, "_orig_mod")
    stored = wanted(gradients, gradient_dtype, gradient_budget, losses, compiled, processes=ranks.size > 1, **asked)
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    return Recorder(
        [unwrapped_optimizer(o) for o in optimizers],
        unwrapped_model(model),
        folder,
        reduction,
        data,
        config,
        watch,
        resume and not overwrite and folder.exists(),
        gradient_filter,
        filtered,
        steps,
        codec,
        ranks,
        precision,
        thin,
        stored,
        overwrite,
    )


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GradScaler has told a fused optimizer that gradients overflowed: its step is called, and does nothing."""
    return bool(getattr(optimizer, "found_inf", None))


def _make_way(folder: Location) -> None:
    """Remove a run, once nothing is left that may be refused."""
    if isinstance(folder, Path) and is_free(folder, but=spools.UNBEGUN):
        spools.check_idle(folder)
        for name in spools.UNBEGUN:
            (folder / name).unlink(missing_ok=True)
    elif folder.exists():
        attributes = schema.open_group(folder, "run").attrs  # only ever remove what is a run,
        spools.check_idle(folder)  # and is not being written
        spools.forget(folder, attributes)
        remove_tree(folder)


def _check_words(reduction: str, codec: str) -> None:
    if reduction not in ("mean", "sum"):
        raise RecordError(
            "unknown reduction of the training loss",
            expected="'mean' or 'sum'",
            got=repr(reduction),
            do="give other weights to recorder.examples",
        )
    if codec not in schema.CHOICES:
        raise RecordError("unknown codec of a run", expected=" or ".join(map(repr, schema.CHOICES)), got=repr(codec), do="choose one")
