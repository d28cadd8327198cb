"""torch.optim.SGD: momentum, dampening, Nesterov, L2 decay, maximize."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from explaind.rules.rule import Filter, numbers


class SGD:
    optimizer = torch.optim.SGD
    options = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    momentum = "momentum_buffer"

    def read(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        return numbers(group, self.options)

    def preconditioner(self, group: Mapping[str, Any]) -> None:
        return None

    def age(self, state: Mapping[str, Any]) -> int:
        return 0 if state.get(self.momentum) is None else 1

    def filter(self, options: Mapping[str, float], age: int, preconditioner: Tensor | None) -> Filter:
        lr, mu = options["lr"], options["momentum"]
        sign = -1.0 if options["maximize"] else 1.0
        decay = options["weight_decay"]
        if mu == 0.0:
            return Filter(E=lr, kappa=decay, sign=sign)
        # The first step copies the gradient into the buffer, without dampening.
        intake = 1.0 - options["dampening"] if age else 1.0
        push, direct = (lr * mu, lr) if options["nesterov"] else (lr, 0.0)
        return Filter(M=mu, N=intake, C=push, E=direct, kappa=decay, sign=sign)
