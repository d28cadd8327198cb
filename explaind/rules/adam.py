"""torch.optim.Adam and AdamW: coupled or decoupled decay, amsgrad, maximize; for-loop, foreach and fused alike."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from explaind.errors import RuleError
from explaind.rules.rule import Filter, numbers


class Adam:
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam
    options = ("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize", "decoupled")
    momentum = "exp_avg"

    def read(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        if group.get("differentiable"):
            raise RuleError("Adam with differentiable=True has no rule", do="record an ordinary run, with differentiable=False")
        beta1, beta2 = group["betas"]
        lr, eps, decay, amsgrad, maximize = numbers(group, ("lr", "eps", "weight_decay", "amsgrad", "maximize"))
        return (lr, float(beta1), float(beta2), eps, decay, amsgrad, maximize, float(self.decoupled(group)))

    def decoupled(self, group: Mapping[str, Any]) -> bool:
        return bool(group.get("decoupled_weight_decay", False))

    def preconditioner(self, group: Mapping[str, Any]) -> str:
        return "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"

    def age(self, state: Mapping[str, Any]) -> int:
        return int(state["step"]) if "step" in state else 0

    def filter(self, options: Mapping[str, float], age: int, preconditioner: Tensor | None) -> Filter:
        if preconditioner is None:
            raise RuleError("Adam needs its second moment to rebuild a step", expected="a recorded preconditioner", got="none")
        lr, beta1, beta2 = options["lr"], options["beta1"], options["beta2"]
        count = age + 1
        # C = lr / (1 − beta1^count) / (√(v / (1 − beta2^count)) + eps)
        root = preconditioner.sqrt() / (1.0 - beta2**count) ** 0.5
        push = lr / (1.0 - beta1**count) / (root + options["eps"])
        decay = options["weight_decay"]
        sign = -1.0 if options["maximize"] else 1.0
        if options["decoupled"]:
            return Filter(M=beta1, N=1.0 - beta1, C=push, R=lr * decay, sign=sign)
        return Filter(M=beta1, N=1.0 - beta1, C=push, kappa=decay, sign=sign)


class AdamW(Adam):
    optimizer = torch.optim.AdamW

    def decoupled(self, group: Mapping[str, Any]) -> bool:
        return bool(group.get("decoupled_weight_decay", True))
