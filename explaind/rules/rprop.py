"""torch.optim.Rprop: steps of its own size in the direction of the gradient's sign; maximize.

Its update does not grow with the gradient. Frozen is what one unit of the gradient moved: size / |g|, and 0 where the sign had turned.
"""

import torch
from torch import Tensor

from explaind.rules.filter import Filter
from explaind.rules.rule import Facts, Moment, Rule


class Rprop(Rule):
    optimizer = torch.optim.Rprop
    options = ("maximize",)
    frozen_state = "step size over the gradient's size, where it stepped"
    reads_theta = False

    def frozen(self, moment: Moment) -> Tensor:
        stepped = moment.state["prev"] != 0
        rate = moment.state["step_size"] / moment.gradient.abs()
        return torch.where(stepped, rate.clamp(max=torch.finfo(rate.dtype).max), 0.0)

    def filter(self, facts: Facts) -> Filter:
        return Filter(E=facts.tensor, sign=facts.sign)
