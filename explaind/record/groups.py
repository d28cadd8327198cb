"""The parameter groups of optimizers, which may change from step to step: most often they don't, and little is done then."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from explaind.rules.rule import Rule


class Groups:
    """Of which parameter is in which group, and what the groups say."""

    def __init__(self, optimizers: Sequence[Optimizer], rules: Sequence[Rule], params: Sequence[Tensor]) -> None:
        self._optimizers, self._rules, self._params = optimizers, rules, params
        self._options = max(len(rule.options) for rule in rules)
        self._held: list[list[int]] | None = None
        self._places, self._strangers = list[int](), list[Tensor]()
        self._read, self._hyper = list[tuple[float, ...]](), np.zeros(0)

    def all(self) -> list[dict[str, Any]]:
        """As they stand."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def places(self) -> list[int]:
        """Which of them each parameter is in, −1 for none; as ``strangers`` or ``hyper`` found it last."""
        return self._places

    def _look(self) -> None:
        held = [list(map(id, group["params"])) for group in self.all()]
        if held != self._held:  # what is held here keeps its id, strangers included
            place = {own: k for k, ids in enumerate(held) for own in ids}
            recorded = {id(p) for p in self._params}
            self._strangers = [p for group in self.all() for p in group["params"] if id(p) not in recorded]
            self._held, self._places, self._read = held, [place.get(id(p), -1) for p in self._params], []

    def strangers(self) -> list[Tensor]:
        """Parameters in them that are not recorded."""
        self._look()
        return self._strangers

    def hyper(self) -> np.ndarray:
        """What they say of every parameter: float64 [layer, option], nan where there is nothing.

        The same array as long as they say the same; nobody may write into it.
        """
        self._look()
        now = [rule.read(g) for rule, optimizer in zip(self._rules, self._optimizers, strict=True) for g in optimizer.param_groups]
        if now != self._read:
            table = np.full((len(now) + 1, self._options), np.nan)  # the last row is for those in no group
            for row, values in zip(table, now, strict=False):
                row[: len(values)] = values
            self._read, self._hyper = now, table[self._places]
        return self._hyper
