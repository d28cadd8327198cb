"""torch.optim.Adamax: Adam with the infinity norm; coupled decay, maximize."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from explaind.rules.adam import moments
from explaind.rules.filter import Filter
from explaind.rules.rule import Facts, Moment, Rule, numbers


class Adamax(Rule):
    optimizer = torch.optim.Adamax
    options = ("lr", "beta1", "beta2", "weight_decay", "maximize")
    momentum = "exp_avg"
    frozen_state = "infinity norm"
    reads_theta = False

    def read(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        lr, decay, maximize = numbers(group, ("lr", "weight_decay", "maximize"))
        return (lr, *moments(group), decay, maximize)

    def frozen(self, moment: Moment) -> Tensor:
        found: Tensor = moment.state["exp_inf"]
        return found

    def filter(self, facts: Facts) -> Filter:
        lr, beta1 = facts.options["lr"], facts.options["beta1"]
        push = lr / (1.0 - beta1 ** (facts.age + 1)) / facts.tensor
        return Filter(M=beta1, N=1.0 - beta1, C=push, kappa=facts.options["weight_decay"], sign=facts.sign)
