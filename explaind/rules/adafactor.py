"""torch.optim.Adafactor: factored second moment, clipped updates, relative steps, decoupled decay, maximize."""

import torch
from torch import Tensor

from explaind.rules.filter import Filter
from explaind.rules.rule import Facts, Moment, Rule


class Adafactor(Rule):
    optimizer = torch.optim.Adafactor
    options = ("lr", "weight_decay", "maximize")
    frozen_state = "rate of each parameter: step size and clipping over the root of its estimated second moment"

    def frozen(self, moment: Moment) -> Tensor:
        group, state, gradient = moment.group, moment.state, moment.gradient
        eps1, eps2 = group["eps"]
        eps1 = torch.finfo(gradient.dtype).eps if eps1 is None else eps1
        if gradient.ndim > 1:
            rows, columns = state["row_var"], state["col_var"]
            variance = rows @ columns / rows.mean(dim=-2, keepdim=True).clamp(min=eps1)
        else:
            variance = state["variance"]
        scale = variance.clamp(min=eps1 * eps1).rsqrt()
        size = gradient.numel() ** 0.5
        step = min(float(group["lr"]), float(state["step"]) ** -0.5) * max(eps2, float(moment.theta.norm()) / size)
        return scale * (step / max(1.0, float((scale * gradient).norm()) / (size * group["d"])))

    def filter(self, facts: Facts) -> Filter:
        return Filter(E=facts.tensor, R=facts.options["lr"] * facts.options["weight_decay"], sign=facts.sign)
