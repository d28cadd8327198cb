"""Which optimizers can be explained, and how a step of each is a linear filter of gradients."""

import inspect

import torch

from explaind.errors import RuleError
from explaind.rules.adadelta import Adadelta
from explaind.rules.adafactor import Adafactor
from explaind.rules.adagrad import Adagrad
from explaind.rules.adam import Adam, AdamW
from explaind.rules.adamax import Adamax
from explaind.rules.asgd import ASGD
from explaind.rules.filter import Filter
from explaind.rules.muon import Muon
from explaind.rules.nadam import NAdam
from explaind.rules.radam import RAdam
from explaind.rules.rmsprop import RMSprop
from explaind.rules.rprop import Rprop
from explaind.rules.rule import Facts, Moment, Rule, numbers
from explaind.rules.sgd import SGD

__all__ = ["RULES", "Facts", "Filter", "Moment", "Rule", "numbers", "register", "rule_named", "rule_of"]
RULES: dict[str, Rule] = {}
"""By the name of the optimizer class, which is also what a run stores."""
REFUSED = {
    "LBFGS": "it evaluates many gradients in a step and combines them nonlinearly",
    "SparseAdam": "its state is sparse, and a parameter's age differs from row to row",
}
"""Optimizers of torch that are no filter of gradients, and why."""


def register(rule: Rule) -> None:
    """Let runs of ``rule.optimizer`` be recorded and explained; call it before both. RuleError where the name is taken by another class."""
    name = rule.optimizer.__name__
    if name in RULES and RULES[name].optimizer is not rule.optimizer:
        taken = RULES[name].optimizer
        raise RuleError(
            f"there is a rule for an optimizer named {name} already",
            expected="another name",
            got=f"{rule.optimizer.__module__}.{name} beside {taken.__module__}.{name}",
            do="rename the class",
        )
    RULES[name] = rule


for _rule in (Adadelta(), Adafactor(), Adagrad(), Adam(), AdamW(), Adamax(), ASGD(), NAdam(), RAdam(), RMSprop(), Rprop(), SGD()):
    register(_rule)
if hasattr(torch.optim, "Muon"):
    register(Muon())


def rule_of(optimizer: torch.optim.Optimizer) -> Rule:
    """The rule of an optimizer; RuleError names the class where there is none.

    A subclass is covered when its ``step`` is the one that the rule describes; torch wraps ``step`` for its profiler, which
    ``inspect.unwrap`` looks through.
    """
    step = inspect.unwrap(type(optimizer).step)
    for cls in type(optimizer).__mro__:
        rule = RULES.get(cls.__name__)
        if rule is not None and cls is rule.optimizer and step is inspect.unwrap(cls.step):
            return checked(rule, optimizer)
    why = next((f": {REFUSED[c.__name__]}" for c in type(optimizer).__mro__ if c.__name__ in REFUSED), "")
    raise RuleError(
        f"the optimizer {type(optimizer).__module__}.{type(optimizer).__qualname__} has no rule{why}",
        expected=f"one of {', '.join(RULES)} (or a subclass with the same step)",
        do="train with one of these, or give explaind.rules.register a rule of your own",
    )


def checked(rule: Rule, optimizer: torch.optim.Optimizer) -> Rule:
    """The rule; RuleError for an option that none covers."""
    name = rule.optimizer.__name__
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            raise RuleError(f"{name} with differentiable=True has no rule", do="record an ordinary run, with differentiable=False")
    return rule


def rule_named(name: str) -> Rule:
    """The rule that a run was recorded with."""
    if name not in RULES:
        raise RuleError(
            f"the run was recorded with the rule {name!r}",
            expected=f"one of {', '.join(RULES)}",
            do="update explaind, or register the rule with explaind.rules.register",
        )
    return RULES[name]
