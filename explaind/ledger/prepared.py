"""A decomposition that was checked and can begin: how a block of its queries is swept, and how its blocks make a ledger."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from explaind.kernel.gradients import take
from explaind.kernel.layout import Layout
from explaind.kernel.machine import Machine
from explaind.kernel.measures import Measures
from explaind.kernel.path import PathRule
from explaind.kernel.products import Products
from explaind.kernel.stored import NoLosses, StoredProducts
from explaind.kernel.sweep import Sweep
from explaind.ledger.assemble import assembled
from explaind.ledger.causes import causes, words_of
from explaind.ledger.key import digest, digest_of_data, values_of_losses, values_of_measure, versions
from explaind.ledger.ledger import Ledger
from explaind.ledger.plan import Plan
from explaind.ledger.sources import STORED
from explaind.ledger.sweeping import Swept
from explaind.ledger.verify import judged, replay_words
from explaind.replay.batches import Readable
from explaind.replay.functional import Functional
from explaind.replay.trajectory import Trajectory

PLACES = ("run", "device", "model", "recorded_model", "config")
"""Settings that may differ between two processes that work on one ledger; what matters of them is told otherwise."""


@dataclass(frozen=True)
class Prepared:
    """Everything that the blocks of one decomposition share."""

    steps: Trajectory
    data: Readable | None
    training: Functional | None
    """None where the gradients of examples are stored."""
    asking: Functional
    layout: Layout
    rule: Callable[[], PathRule]
    theta: Tensor
    """The parameters before the first step."""
    batch: Any
    """All queries."""
    plan: Plan
    bounds: list[slice]
    """The queries of each block."""
    chunk: int
    machine: Machine
    """Decides how products are made: that of the process that began, so that all that go on decide alike."""
    settings: Mapping[str, Any]
    doubts: tuple[str, ...]

    def sweep(self, block: int) -> Sweep:
        """The sweep of one block, at its beginning."""
        wanted, asked, run = self.plan.wanted, self.settings, self.steps.run
        some = self.batch if len(self.bounds) == 1 else take(self.batch, self.bounds[block])
        measures = Measures(self.asking, some, self.layout, wanted.keep, self.theta, self.chunk, self.plan.groups)
        losses = NoLosses() if self.training is None else self.training
        made = (losses, self.layout, wanted.finest, "auto" if self.training is None else asked["products"], self.chunk, self.machine)
        dots = StoredProducts(*made) if self.training is None else Products(*made)
        correct = asked["closure"] == "discrete-gradient"
        return Sweep(self.steps, measures, losses, self.rule(), dots, wanted, run.examples, correct, self.plan.groups.get("example"))

    def key(self) -> dict[str, Any]:
        """What tells this decomposition from others (key.py)."""
        run = self.steps.run
        return {
            **{name: value for name, value in self.settings.items() if name not in PLACES},
            "machine": asdict(self.machine),
            "versions": versions(),
            "recording": run.identity,
            "doubts": self.doubts,
            "data": STORED
            if self.training is None or self.data is None
            else digest_of_data(self.data, run.examples, None if self.doubts else run.fingerprint),
            "queries": digest(self.batch),
            "measure": values_of_measure(self.asking, self.layout, self.theta, self.batch),
            "losses": STORED if self.training is None else values_of_losses(self.training, self.layout, self.steps),
            "blocks": [[rows.start, rows.stop] for rows in self.bounds],
        }

    def ledger(self, done: Sequence[Swept]) -> Ledger:
        """The ledger of all blocks."""
        return assembled(done, self.plan, self.layout, {**self.settings, **self._lived}, self._doubts(done), self._has_gaps)

    def ledger_of(self, done: Mapping[int, Swept], shard: str) -> Ledger:
        """The ledger of some blocks, with the queries of these alone."""
        queries = np.concatenate([np.arange(self.bounds[i].start, self.bounds[i].stop) for i in done])
        settings = {**self.settings, **self._lived, "shard": shard}
        found = list(done.values())
        return assembled(found, self.plan.of_queries(queries), self.layout, settings, self._doubts(found), self._has_gaps)

    @property
    def _lived(self) -> dict[str, Any]:
        """How exactly a thin run was lived again; nothing of a full one."""
        found = self.steps.lived()
        return {"relived": found.note, "anchored": found.anchored} if found.steps else {}

    @property
    def _has_gaps(self) -> bool:
        return bool(self.steps.run.gaps.any())

    def _doubts(self, done: Sequence[Swept]) -> tuple[str, ...]:
        """With the likely causes of a replay that differs."""
        lived = self.steps.lived()
        errors = judged(done[0].accounts.replay_error.cpu().numpy(), lived.anchored)
        doubts = (*self.doubts, *lived.doubts)
        if not replay_words(errors, self.layout.names, self.settings["rounding"]):
            return doubts
        if self.training is None or self.data is None:
            return doubts
        return (*doubts, *words_of(causes(self.steps, errors, self.layout, self.training, self.data)))
