"""Which operation has which secant rule.

A rule takes the operation and its arguments, some of them pairs, and gives its value as a pair (or several): the values at both ends
and the change d. The one law that every rule keeps: where the arguments change by b − a, so does the value, exactly.
"""

from collections.abc import Callable
from typing import Any

import torch

from explaind.errors import RequestError

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}
"""ATen operation (without its overload) -> its rule."""


class NoSecant(RequestError):
    """The model holds an operation without a secant rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for these ATen operations, several to a word list; a name that this torch does not have is skipped."""

    def register(function: Rule) -> Rule:
        for name in " ".join(names).split():
            if hasattr(torch.ops.aten, name):
                RULES[getattr(torch.ops.aten, name)] = function
        return function

    return register


def refuse(op: Any, why: str = "it has no secant rule") -> NoSecant:
    """The error for an operation that cannot be taken."""
    return NoSecant(
        f"the secant rule cannot take an operation of the model: {why}",
        where=str(op),
        do="use rule='auto', which falls back to the adaptive rule, or rule='adaptive'",
    )
