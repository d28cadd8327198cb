"""torch.optim.ASGD: coupled decay and its own, maximize. The averaged parameters, which it does not train with, are not recorded."""

import torch

from explaind.rules.filter import Filter
from explaind.rules.rule import Facts, Moment, Rule


class ASGD(Rule):
    optimizer = torch.optim.ASGD
    options = ("lr", "lambd", "weight_decay", "maximize")
    scalars = ("eta",)
    remembers = ("eta",)
    reads_theta = False

    def facts(self, moment: Moment) -> tuple[float, ...]:
        first = torch.as_tensor(moment.group["lr"], dtype=torch.get_default_dtype())  # what torch begins with, rounding included
        return (float(moment.before.get("eta", first)),)

    def filter(self, facts: Facts) -> Filter:
        eta = facts.scalars["eta"]
        return Filter(E=eta, R=facts.options["lambd"] * eta, kappa=facts.options["weight_decay"], sign=facts.sign)
