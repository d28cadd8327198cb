"""torch.optim.Muon: momentum made nearly orthogonal by Newton–Schulz iterations; Nesterov, decoupled decay.

An iteration maps X to (a I + b X Xᵀ + c (X Xᵀ)²) X, so that all of them are one matrix Q in front of U, the momentum that goes in.
Frozen is U; Q is rebuilt from it. torch iterates in bfloat16: what its rounding moved stands in the ledger's arithmetic. It is much where
U has a low rank, as after a batch that is smaller than the matrix: the iterations make rounding in all other directions as large as the
rest. They are done once more in bfloat16, so that a replay can be told from rounding.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from explaind.rules.filter import Filter, Mix
from explaind.rules.rule import Facts, Moment, Rule, numbers

SCALES = (None, "original", "match_rms_adamw")


class Muon(Rule):
    optimizer = getattr(torch.optim, "Muon", torch.optim.Optimizer)  # torch has it since 2.9
    options = ("lr", "momentum", "weight_decay", "nesterov", "eps", "ns_steps", "a", "b", "c", "scale")
    momentum = "momentum_buffer"
    frozen_state = "the matrix that is made orthogonal"
    reads_theta = False
    rounding = 0.8  # measured: 0.02 to 0.1 where U has full rank, 0.2 to 0.5 on matrices of 64 to 512 rows where not, 0.78 on 4 × 3

    def read(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        scale = float(SCALES.index(group["adjust_lr_fn"]))
        return (*numbers(group, self.options[:6]), *(float(x) for x in group["ns_coefficients"]), scale)

    def age(self, state: Mapping[str, Any]) -> int:
        return 1 if "momentum_buffer" in state else 0

    def frozen(self, moment: Moment) -> Tensor:
        z: Tensor = moment.state["momentum_buffer"]
        return torch.lerp(moment.gradient, z, moment.group["momentum"]) if moment.group["nesterov"] else z

    def filter(self, facts: Facts) -> Filter:
        o, u = facts.options, facts.tensor
        left = u.shape[0] <= u.shape[1]
        x = u if left else u.T
        iterations = (o["a"], o["b"], o["c"]), int(o["ns_steps"]), o["eps"]
        q = orthogonalizer(x, *iterations)
        moved = iterated(x, *iterations).to(x) - q @ x
        mix = Mix(q, left, u.numel())
        mu = o["momentum"]
        push, direct = (mu, 1.0 - mu) if o["nesterov"] else (1.0, 0.0)
        rate = o["lr"] * size_factor(SCALES[int(o["scale"])], *u.shape)
        rounding = -rate * (moved if left else moved.T)
        return Filter(M=mu, N=1.0 - mu, C=rate * push, E=rate * direct, R=o["lr"] * o["weight_decay"], P=(mix,), rounding=rounding)


def orthogonalizer(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Q [row, row] with Q X = the Newton–Schulz iterations of X [row, column], row <= column (Jordan et al., Muon, 2024)."""
    a, b, c = coefficients
    identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    q = identity / x.norm().clamp(min=eps)
    gram = x @ x.T
    for _ in range(steps):
        now = q @ gram @ q.T  # X Xᵀ of the X of this iteration
        q = (a * identity + b * now + c * now @ now) @ q
    return q


def iterated(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The iterations of X [row, column] in bfloat16, rounded where torch rounds them."""
    a, b, c = coefficients
    x = x.bfloat16()
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def size_factor(scale: str | None, rows: int, columns: int) -> float:
    """The factor on the learning rate for a parameter of this shape."""
    if scale == "match_rms_adamw":
        return 0.2 * float(max(rows, columns)) ** 0.5
    return max(1.0, rows / columns) ** 0.5
