"""The parameter groups of optimizers, which may change from step to step: most often they don't, and little is done then."""

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from explaind.rules.rule import Rule

PLAIN = (bool, int, float, str, type(None))
"""Kinds of options that are what they were as long as they are equal."""


class Groups:
    """Of which parameter is in which group, and what the groups say."""

    def __init__(self, optimizers: Sequence[Optimizer], rules: Sequence[Rule], params: Sequence[Tensor]) -> None:
        self._optimizers, self._rules, self._params = optimizers, rules, params
        self._options = max(len(rule.options) for rule in rules)
        self._held: list[list[int]] | None = None
        self.places = list[int]()
        """Which of the groups each parameter is in, −1 for none; as ``look`` found it last."""
        self.strangers = list[Tensor]()
        """Parameters in them that are not recorded; likewise."""
        self._told = list[_Told]()
        self._hyper = np.zeros(0)

    def all(self) -> list[dict[str, Any]]:
        """As they stand."""
        if len(self._optimizers) == 1:
            return self._optimizers[0].param_groups
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def look(self) -> None:
        """See which parameters are in which group now."""
        held = [[*map(id, group["params"])] for group in self.all()]
        if held != self._held:  # what is held here keeps its id, strangers included
            place = {own: k for k, ids in enumerate(held) for own in ids}
            recorded = {id(p) for p in self._params}
            self.strangers = [p for group in self.all() for p in group["params"] if id(p) not in recorded]
            self._held, self.places, self._told = held, [place.get(id(p), -1) for p in self._params], []

    def hyper(self) -> np.ndarray:
        """What they say of every parameter, as ``look`` found them: float64 [layer, option], nan where there is nothing.

        The same array as long as they say the same; nobody may write into it.
        """
        groups = self.all()
        if not self._told or not all(map(_Told.stands, self._told, groups)):
            rules = [rule for rule, optimizer in zip(self._rules, self._optimizers, strict=True) for _ in optimizer.param_groups]
            now = [rule.read(group) for rule, group in zip(rules, groups, strict=True)]
            if not self._told or now != [told.read for told in self._told]:
                table = np.full((len(now) + 1, self._options), np.nan)  # the last row is for those in no group
                for row, values in zip(table, now, strict=False):
                    row[: len(values)] = values
                self._hyper = table[self.places]
            self._told = [_Told(group, read) for group, read in zip(groups, now, strict=True)]
        return self._hyper

    def stand(self, hyper: np.ndarray) -> bool:
        """Whether they surely hold what ``look`` found last, and say this, which ``hyper`` returned last."""
        groups, told = self.all(), self._told
        if hyper is not self._hyper or not told or self.strangers:
            return False
        return [[*map(id, group["params"])] for group in groups] == self._held and all(map(_Told.stands, told, groups))


class _Told:
    """What a group said when it was read: where it says the same still, a rule need not read it again."""

    def __init__(self, group: Mapping[str, Any], read: tuple[float, ...]) -> None:
        self.read = read
        self._count = len(group)
        self._keys = [key for key, value in group.items() if type(value) in PLAIN]
        self._values = [group[key] for key in self._keys]
        self._kinds = [*map(type, self._values)]
        self._pairs = [key for key, value in group.items() if type(value) is tuple and all(type(own) in PLAIN for own in value)]
        self._held = [group[key] for key in self._pairs]
        self._sure = len(self._keys) + len(self._pairs) + 1 == self._count
        """Nothing may change in place, as tensors and lists do, but the parameters."""

    def stands(self, group: Mapping[str, Any]) -> bool:
        """Whether that is sure. Kinds are asked first, and a tuple must be the same one: a tensor is equal to a number that it rounds."""
        if not self._sure or len(group) != self._count:
            return False
        values = [*map(group.get, self._keys)]
        same = [*map(type, values)] == self._kinds and values == self._values
        return same and all(map(is_, map(group.get, self._pairs), self._held))
