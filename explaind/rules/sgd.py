"""torch.optim.SGD: momentum, dampening, Nesterov, L2 decay, maximize. While momentum is 0, torch leaves the buffer as it is."""

from collections.abc import Mapping
from typing import Any

import torch

from explaind.rules.filter import Filter
from explaind.rules.rule import Facts, Rule


class SGD(Rule):
    optimizer = torch.optim.SGD
    options = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    momentum = "momentum_buffer"
    reads_theta = False

    def age(self, state: Mapping[str, Any]) -> int:
        return 0 if state.get(self.momentum) is None else 1

    def filter(self, facts: Facts) -> Filter:
        o = facts.options
        lr, mu, decay = o["lr"], o["momentum"], o["weight_decay"]
        if mu == 0.0:
            return Filter(M=1.0, E=lr, kappa=decay, sign=facts.sign)
        # The first step copies the gradient into the buffer, without dampening.
        intake = 1.0 - o["dampening"] if facts.age else 1.0
        push, direct = (lr * mu, lr) if o["nesterov"] else (lr, 0.0)
        return Filter(M=mu, N=intake, C=push, E=direct, kappa=decay, sign=facts.sign)
