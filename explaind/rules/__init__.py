"""Which optimizers can be explained, and how a step of each is a linear filter of gradients."""

import inspect

import torch

from explaind.errors import RuleError
from explaind.rules.adam import Adam, AdamW
from explaind.rules.rule import Rule
from explaind.rules.sgd import SGD

RULES: dict[str, Rule] = {rule.optimizer.__name__: rule for rule in (SGD(), Adam(), AdamW())}
"""By the name of the optimizer class, which is also what a run stores."""


def rule_of(optimizer: torch.optim.Optimizer) -> Rule:
    """The rule of an optimizer; RuleError names the class where there is none.

    A subclass is covered when its ``step`` is the one that the rule describes; torch wraps ``step`` for its profiler, which
    ``inspect.unwrap`` looks through.
    """
    step = inspect.unwrap(type(optimizer).step)
    for cls in type(optimizer).__mro__:
        rule = RULES.get(cls.__name__)
        if rule is not None and cls is rule.optimizer and step is inspect.unwrap(cls.step):
            return rule
    raise RuleError(
        f"the optimizer {type(optimizer).__module__}.{type(optimizer).__qualname__} has no rule",
        expected=f"one of {', '.join(RULES)} (or a subclass with the same step)",
        do="train with one of these",
    )


def rule_named(name: str) -> Rule:
    """The rule that a run was recorded with."""
    if name not in RULES:
        raise RuleError(f"the run was recorded with the rule {name!r}", expected=f"one of {', '.join(RULES)}", do="update explaind")
    return RULES[name]
