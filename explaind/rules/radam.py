"""torch.optim.RAdam: Adam whose rate is rectified, and plain momentum while the second moment is too young."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from explaind.rules.adam import averaged, moments
from explaind.rules.filter import Filter
from explaind.rules.rule import Facts, Moment, Rule, numbers


class RAdam(Rule):
    optimizer = torch.optim.RAdam
    options = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize", "decoupled")
    momentum = "exp_avg"
    frozen_state = "second moment"
    reads_theta = False

    def read(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        lr, *others = numbers(group, ("lr", "eps", "weight_decay"))
        return (lr, *moments(group), *others, float(group.get("maximize", False)), float(group["decoupled_weight_decay"]))

    def frozen(self, moment: Moment) -> Tensor:
        found: Tensor = moment.state["exp_avg_sq"]
        return found

    def filter(self, facts: Facts) -> Filter:
        lr, beta1, beta2, eps = (facts.options[name] for name in ("lr", "beta1", "beta2", "eps"))
        count = facts.age + 1
        rate, missing = lr / (1.0 - beta1**count), 1.0 - beta2**count
        # rho: length of the average that the second moment is by now, and at most
        most = 2.0 / (1.0 - beta2) - 1.0
        rho = most - 2.0 * count * beta2**count / missing
        if rho <= 5.0:
            return averaged(facts, rate)
        rectified = ((rho - 4.0) * (rho - 2.0) * most / ((most - 4.0) * (most - 2.0) * rho)) ** 0.5
        return averaged(facts, rate * rectified * missing**0.5 / (facts.tensor.sqrt() + eps))
