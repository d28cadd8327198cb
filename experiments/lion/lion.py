"""An optimizer that explaind does not know, and the rule that lets it be explained.

Lion (Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675):

    u  = beta1 z + (1 − beta1) g
    z' = beta2 z + (1 − beta2) g
    Δ  = −lr sign(u) − lr · weight_decay · θ

A sign is no linear filter of gradients, but sign(u) = u / |u| is one whose preconditioner 1 / |u| is frozen, as Adam's second moment
is. And u can be written with the momentum after the step, as a rule must have it:

    u = beta1 / beta2 · z' + (1 − beta1 / beta2) g
"""

import torch
from torch import Tensor

from explaind.rules import Facts, Filter, Moment, Rule, numbers, register


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                u = beta1 * z + (1 - beta1) * p.grad
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u.sign(), alpha=-group["lr"])
                z.mul_(beta2).add_(p.grad, alpha=1 - beta2)
        return loss


class LionRule(Rule):
    optimizer = Lion
    options = ("lr", "beta1", "beta2", "weight_decay")  # stored at every step
    momentum = "exp_avg"  # the key of z
    remembers = ("exp_avg",)  # copied before every step, for ``frozen``
    frozen_state = "what one unit of u moved: 1 / |u|, 0 where there was none"

    def read(self, group):
        return (float(group["lr"]), *map(float, group["betas"]), *numbers(group, ("weight_decay",)))

    def age(self, state):
        return 0  # its coefficients do not depend on how many steps there were

    def frozen(self, moment: Moment) -> Tensor:
        beta1 = moment.group["betas"][0]
        z = moment.before.get("exp_avg", torch.zeros_like(moment.theta))
        size = (beta1 * z + (1 - beta1) * moment.gradient).abs()
        return torch.where(size > 0, 1 / size, 0.0)

    def filter(self, facts: Facts) -> Filter:
        lr, beta1, beta2, decay = (facts.options[name] for name in self.options)
        rate, share = lr * facts.tensor, beta1 / beta2
        return Filter(M=beta2, N=1 - beta2, C=share * rate, E=(1 - share) * rate, R=lr * decay)


register(LionRule())
