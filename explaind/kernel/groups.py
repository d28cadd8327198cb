"""Members of an axis put into groups, whose credit is summed before the work where that is less of it."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind.errors import RequestError

GROUPABLE = ("query", "output", "example", "layer")
REST = "rest"
"""The group of all that is in none, so that the sum stays whole."""

Asked = Mapping[str, Any]
"""Name of each group and its members: ids of examples, places of queries or outputs, names of layers or patterns such as "heads.*"."""


@dataclass(frozen=True, eq=False)
class Grouping:
    """names of the groups, and for every member of the axis the place of its group: of [member]."""

    names: tuple[str, ...]
    of: np.ndarray

    def sums(self, like: Tensor) -> Tensor:
        """The matrix [member, group] of ones and zeros that sums members."""
        return torch.nn.functional.one_hot(torch.from_numpy(self.of), len(self.names)).to(like)


def grouping(axis: str, asked: Asked, members: Sequence[Any]) -> Grouping:
    """Put the members of an axis into the groups that were asked for; RequestError for one that is not there or in two groups."""
    place = {member: i for i, member in enumerate(members)}
    of = np.full(len(members), -1, dtype=np.int64)
    for group, (name, wanted) in enumerate(asked.items()):
        found = np.array([i for want in _listed(axis, name, wanted) for i in _places(axis, name, want, place)], dtype=np.int64)
        twice = found[(of[found] != -1) & (of[found] != group)]
        if len(twice):
            raise RequestError(
                "a member is in two groups",
                where=f"groups of {axis}",
                expected="each in one group",
                got=f"{members[twice[0]]!r} in {tuple(asked)[of[twice[0]]]!r} and {name!r}",
                do="take it out of one",
            )
        of[found] = group
    names = [str(name) for name in asked]
    if (of == -1).any():
        names += [] if REST in names else [REST]
        of[of == -1] = names.index(REST)
    return Grouping(tuple(names), of)


def check_groups(asked: Mapping[str, Any], keep: frozenset[str]) -> None:
    """RequestError for groups of an axis that has none, or that is not kept."""
    for axis, groups in asked.items():
        if axis not in GROUPABLE:
            do = "give windows for steps" if axis == "step" else "name the axis"
            raise RequestError("groups of an axis that cannot be grouped", expected=", ".join(GROUPABLE), got=repr(axis), do=do)
        if axis not in keep:
            raise RequestError("groups of an axis that is not kept", got=repr(axis), do=f"add {axis!r} to keep, or drop its groups")
        if not isinstance(groups, str | Mapping) or not groups:
            raise RequestError(
                "groups are named", where=f"groups of {axis}", expected="{name: members}", got=repr(groups), do="name each group"
            )


def plain(asked: Asked) -> dict[str, list[Any]]:
    """Groups as JSON holds them."""
    return {str(name): _listed("", str(name), wanted) for name, wanted in asked.items()}


def _listed(axis: str, name: str, wanted: Any) -> list[Any]:
    listed = [wanted] if isinstance(wanted, str) else np.asarray(wanted).tolist()
    if not isinstance(listed, list) or not listed:
        raise RequestError(
            "a group has no members", where=f"groups of {axis}: {name!r}", expected="a list", got=repr(wanted), do="list some or drop it"
        )
    return listed


def _places(axis: str, name: str, want: Any, place: Mapping[Any, int]) -> list[int]:
    """Where the members are that one entry of a group stands for."""
    if want in place:
        return [place[want]]
    found = [i for member, i in place.items() if axis == "layer" and isinstance(want, str) and fnmatchcase(member, want)]
    if not found:
        some = difflib.get_close_matches(str(want), map(str, place), n=1) or [f"one of the {len(place)} members of the axis"]
        raise RequestError(
            "a group names what is not there", where=f"groups of {axis}: {name!r}", expected=some[0], got=repr(want), do="correct it"
        )
    return found
