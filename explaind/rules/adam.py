"""torch.optim.Adam and AdamW: coupled or decoupled decay, amsgrad, maximize; for-loop, foreach and fused alike."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from explaind.rules.filter import Coefficient, Filter
from explaind.rules.rule import Facts, Moment, Rule, numbers


def moments(group: Mapping[str, Any]) -> tuple[float, float]:
    """beta1, beta2 of a parameter group, which may be tensors."""
    beta1, beta2 = group["betas"]
    return float(beta1), float(beta2)


def averaged(facts: Facts, push: Coefficient, direct: Coefficient = 0.0) -> Filter:
    """z' = beta1 z + (1 − beta1) g, Δ = −push z' − direct g, with the weight decay where it belongs: decoupled, or else in g."""
    beta1, decay = facts.options["beta1"], facts.options["weight_decay"]
    apart, within = (facts.options["lr"] * decay, 0.0) if facts.options["decoupled"] else (0.0, decay)
    return Filter(M=beta1, N=1.0 - beta1, C=push, E=direct, R=apart, kappa=within, sign=facts.sign)


class Adam(Rule):
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam
    options = ("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize", "decoupled")
    momentum = "exp_avg"
    frozen_state = "second moment, or its running maximum"
    reads_theta = False

    def read(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        lr, *others = numbers(group, ("lr", "eps", "weight_decay", "amsgrad", "maximize"))
        return (lr, *moments(group), *others, float(self.decoupled(group)))

    def decoupled(self, group: Mapping[str, Any]) -> bool:
        return bool(group.get("decoupled_weight_decay", False))

    def frozen(self, moment: Moment) -> Tensor:
        found: Tensor = moment.state["max_exp_avg_sq" if moment.group["amsgrad"] else "exp_avg_sq"]
        return found

    def filter(self, facts: Facts) -> Filter:
        lr, beta1, beta2, eps = (facts.options[name] for name in ("lr", "beta1", "beta2", "eps"))
        count = facts.age + 1
        # C = lr / (1 − beta1^count) / (√(v / (1 − beta2^count)) + eps)
        root = facts.tensor.sqrt() / (1.0 - beta2**count) ** 0.5
        return averaged(facts, lr / (1.0 - beta1**count) / (root + eps))


class AdamW(Adam):
    optimizer = torch.optim.AdamW

    def decoupled(self, group: Mapping[str, Any]) -> bool:
        return bool(group.get("decoupled_weight_decay", True))
