"""torch.optim.NAdam: Adam with Nesterov's look ahead; coupled or decoupled decay, momentum decay, maximize."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from explaind.rules.adam import averaged, moments
from explaind.rules.filter import Filter
from explaind.rules.rule import Facts, Moment, Rule, numbers


class NAdam(Rule):
    optimizer = torch.optim.NAdam
    options = ("lr", "beta1", "beta2", "eps", "weight_decay", "momentum_decay", "maximize", "decoupled")
    momentum = "exp_avg"
    frozen_state = "second moment"
    reads_theta = False
    scalars = ("mu_product",)

    def read(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        lr, *others = numbers(group, ("lr", "eps", "weight_decay", "momentum_decay"))
        return (lr, *moments(group), *others, float(group.get("maximize", False)), float(group["decoupled_weight_decay"]))

    def frozen(self, moment: Moment) -> Tensor:
        found: Tensor = moment.state["exp_avg_sq"]
        return found

    def facts(self, moment: Moment) -> tuple[float, ...]:
        return (float(moment.state["mu_product"]),)

    def filter(self, facts: Facts) -> Filter:
        names = ("lr", "beta1", "beta2", "eps", "momentum_decay")
        lr, beta1, beta2, eps, slowing = (facts.options[name] for name in names)
        count, product = facts.age + 1, facts.scalars["mu_product"]
        # mu_t = beta1 (1 − 0.96^(t · momentum_decay) / 2); product = mu_1 … mu_count
        mu, mu_next = (beta1 * (1.0 - 0.5 * 0.96 ** (t * slowing)) for t in (count, count + 1))
        root = (facts.tensor / (1.0 - beta2**count)).sqrt() + eps
        push, direct = lr * mu_next / (1.0 - product * mu_next), lr * (1.0 - mu) / (1.0 - product)
        return averaged(facts, push / root, direct / root)
