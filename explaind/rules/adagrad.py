"""torch.optim.Adagrad: a falling learning rate, coupled decay, maximize; for-loop, foreach and fused alike."""

import torch
from torch import Tensor

from explaind.rules.filter import Filter
from explaind.rules.rule import Facts, Moment, Rule


class Adagrad(Rule):
    optimizer = torch.optim.Adagrad
    options = ("lr", "lr_decay", "eps", "weight_decay", "maximize")
    frozen_state = "sum of squared gradients"
    reads_theta = False

    def frozen(self, moment: Moment) -> Tensor:
        found: Tensor = moment.state["sum"]
        return found

    def filter(self, facts: Facts) -> Filter:
        o = facts.options
        rate = o["lr"] / (1.0 + facts.age * o["lr_decay"])
        return Filter(E=rate / (facts.tensor.sqrt() + o["eps"]), kappa=o["weight_decay"], sign=facts.sign)
