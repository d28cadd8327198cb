"""torch.optim.Adadelta: coupled decay, maximize."""

import torch
from torch import Tensor

from explaind.rules.filter import Filter
from explaind.rules.rule import Facts, Moment, Rule


class Adadelta(Rule):
    optimizer = torch.optim.Adadelta
    options = ("lr", "weight_decay", "maximize")
    frozen_state = "rate of each parameter: root mean square of its past updates over that of its gradients"
    reads_theta = False
    remembers = ("acc_delta",)

    def frozen(self, moment: Moment) -> Tensor:
        eps, square = moment.group["eps"], moment.state["square_avg"]
        updates = moment.before.get("acc_delta", torch.zeros_like(square))
        return (updates + eps).sqrt() / (square + eps).sqrt()

    def filter(self, facts: Facts) -> Filter:
        return Filter(E=facts.options["lr"] * facts.tensor, kappa=facts.options["weight_decay"], sign=facts.sign)
