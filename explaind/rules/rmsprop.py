"""torch.optim.RMSprop: momentum, centred, coupled decay, maximize. While momentum is 0, torch leaves the buffer as it is."""

import torch
from torch import Tensor

from explaind.rules.filter import Filter
from explaind.rules.rule import Facts, Moment, Rule


class RMSprop(Rule):
    optimizer = torch.optim.RMSprop
    options = ("lr", "momentum", "eps", "weight_decay", "centered", "maximize")
    momentum = "momentum_buffer"
    frozen_state = "second moment, less the squared first one where centred"
    reads_theta = False

    def frozen(self, moment: Moment) -> Tensor:
        square: Tensor = moment.state["square_avg"]
        if not moment.group["centered"]:
            return square
        mean = moment.state["grad_avg"]
        return square.addcmul(mean, mean, value=-1)

    def filter(self, facts: Facts) -> Filter:
        o = facts.options
        scale = 1.0 / (facts.tensor.sqrt() + o["eps"])
        if o["momentum"] <= 0.0:
            return Filter(M=1.0, E=o["lr"] * scale, kappa=o["weight_decay"], sign=facts.sign)
        return Filter(M=o["momentum"], N=scale, C=o["lr"], kappa=o["weight_decay"], sign=facts.sign)
