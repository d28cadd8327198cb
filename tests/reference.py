"""The ledger, slowly and obviously: the sum over steps, past steps and examples, with a momentum buffer for each example.

    h(θ') − h(θ) = <ḡ, Δ> + path,        Δ = −(C z' + E g) − R θ,        z' = M z + N g,        g = sign Σ_i w_i ∇ℓ_i(θ) + κ θ

All but path is linear in the g of all steps so far, hence in each example's share of them. Each share is pushed forwards in
time, and its movement of θ is dotted with ḡ at every step: full[query, output, example, layer, seen, applied].
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch
from torch import Tensor, nn

from explaind.rules import rule_of
from explaind.rules.filter import COEFFICIENTS, IDLE, STILL, Filter
from explaind.rules.rule import Facts
from explaind.rules.rule import Moment as Made
from tests import cases


@dataclass
class Moment:
    """One step as it was watched, without a recorder: θ, z and every coefficient of the filter are [param]."""

    theta: Tensor
    momentum: Tensor
    filter: Filter | None = None
    after: Tensor | None = None
    momentum_after: Tensor | None = None
    consumed: Tensor | None = None


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def spread(filters: list[Filter], params: list[Tensor]) -> Filter:
    """One filter whose coefficients are all diagonals [param]."""
    pairs, starts = list(zip(filters, params, strict=True)), np.cumsum([0, *(p.numel() for p in params)]).tolist()
    mixes = [replace(mix, start=start) for f, start in zip(filters, starts, strict=False) for mix in f.P]
    return Filter(**{c: flat(torch.zeros_like(p) + getattr(f, c) for f, p in pairs) for c in COEFFICIENTS}, P=tuple(mixes))


def watch(optimizer: torch.optim.Optimizer, params: list[Tensor], buffers: Sequence[Tensor] = ()) -> list[Moment]:
    """A list that fills while the optimizer steps; buffers, which move before it does, come behind the parameters."""
    rule, moments, ages, before_step = rule_of(optimizer), [], {}, {}
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}

    still = [flat(buffers)] if buffers else []

    def momentum() -> Tensor:
        found = [optimizer.state.get(p, {}).get(rule.momentum) for p in params]
        own = (torch.zeros_like(p) if z is None else z for z, p in zip(found, params, strict=True))
        return flat([*own, *(torch.zeros_like(b) for b in buffers)])

    def before(*_):
        for p in params:
            state = optimizer.state.get(p, {})
            ages[p] = rule.age(state)
            before_step[p] = p.detach().clone(), {key: state[key].clone() for key in rule.remembers if key in state}
        moments.append(Moment(torch.cat([flat(params), *still]), momentum()))

    def filtered(p: Tensor) -> Filter:
        if p.grad is None:
            return IDLE
        made = Made(before_step[p][0], p.grad, before_step[p][1], optimizer.state[p], group_of[p])
        frozen = rule.frozen(made)
        options = dict(zip(rule.options, rule.read(group_of[p]), strict=True))
        scalars = dict(zip(rule.scalars, rule.facts(made), strict=True))
        return rule.filter(Facts(options, ages[p], scalars, None if frozen is None else frozen.clone()))

    def after(*_):
        still[:] = [flat(buffers)] if buffers else []
        moments[-1].after, moments[-1].momentum_after = flat([*params, *buffers]), momentum()
        moments[-1].filter = spread([*map(filtered, params), *(STILL for _ in buffers)], [*params, *buffers])
        moments[-1].consumed = flat([*(torch.zeros_like(p) if p.grad is None else p.grad for p in params), *map(torch.zeros_like, buffers)])

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return moments


def derivative(value: Tensor, params: list[Tensor]) -> Tensor:
    """∇ value: [param]"""
    parts = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
    return flat(torch.zeros_like(p) if g is None else g for g, p in zip(parts, params, strict=True))


def gauss(n: int) -> list[tuple[float, float]]:
    """(node, weight) on [0, 1]"""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return [((x + 1) / 2, w / 2) for x, w in zip(nodes, weights, strict=True)]


@dataclass(frozen=True)
class Reference:
    """Every row, with both step axes where a gradient of one step moved θ at another."""

    full: np.ndarray  # query output example layer seen applied
    decayed: np.ndarray  # query output layer seen applied
    momentum0: np.ndarray  # query output layer
    buffers: np.ndarray  # query output layer step
    path: np.ndarray  # query output step
    initial: np.ndarray  # query output
    final: np.ndarray  # query output

    def data(self, view: str) -> np.ndarray:
        return self.full.sum(-1 if view == "seen" else -2)

    def decay(self, view: str) -> np.ndarray:
        return self.decayed.sum(-1 if view == "seen" else -2)


def written_out(model: nn.Module) -> nn.Module:
    """The same function in eval mode, differentiable by running statistics too."""
    if not isinstance(model, nn.Sequential):
        return model
    return lambda x: reduce(lambda y, layer: normalised(layer, y) if isinstance(layer, nn.BatchNorm1d) else layer(y), model, x)


def normalised(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    return (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias


class Slow:
    """One training and its decomposition."""

    def __init__(self, problem: cases.Problem, case: cases.Case, warm: bool = False, nodes: int = 4) -> None:
        self.problem, self.nodes = problem, gauss(nodes)
        self.model = problem.model()
        trained = cases.trainable(self.model)
        self.buffers = [b for name, b in self.model.named_buffers() if "running" in name]
        self.params = [*trained, *self.buffers]
        optimizer = case.make(trained)
        if warm:
            cases.train(problem, self.model, optimizer, case)
        self.moments = watch(optimizer, trained, self.buffers)
        cases.train(problem, self.model, optimizer, case)
        ends = np.cumsum([p.numel() for p in self.params])
        self.layers = [slice(end - p.numel(), end) for end, p in zip(ends, self.params, strict=True)]

    def at(self, theta: Tensor) -> nn.Module:
        with torch.no_grad():
            for p, cut in zip(self.params, self.layers, strict=True):
                p.copy_(theta[cut].reshape(p.shape))
        return self.model

    def measured(self, theta: Tensor) -> Tensor:
        """h(θ): [query, output]"""
        model = self.at(theta).eval()
        for buffer in self.buffers:
            buffer.requires_grad_()
        return cases.measure(written_out(model), cases.QUERIES)

    def average(self, moment: Moment) -> Tensor:
        """ḡ: [query, output, param]"""
        total = torch.tensor(0.0)
        for t, w in self.nodes:
            values = self.measured(moment.theta + t * (moment.after - moment.theta))
            total = total + w * torch.stack([torch.stack([derivative(v, self.params) for v in row]) for row in values])
        return total

    def shares(self, step: int) -> list[tuple[int, Tensor]]:
        """(example, w_i ∇ℓ_i(θ)) of a step."""
        for buffer in self.buffers:
            buffer.requires_grad_(False)
        model = self.at(self.moments[step].theta).train(self.problem.trains(step))
        found = []
        for index, part in enumerate(self.problem.steps[step]):
            ids = torch.tensor(part)
            torch.manual_seed(100 * step + index)
            each = cases.losses(model, cases.DATA[ids])
            found += [(i, w * self.of_trained(loss)) for i, w, loss in zip(part, self.problem.weights(ids), each, strict=True)]
        whole = sum(share for _, share in found)
        if self.problem.response is not None:
            return found
        factor = torch.where(whole != 0, self.moments[step].consumed / whole, 1.0)  # what clipping did to every number
        return [(i, factor * share) for i, share in found]

    def of_trained(self, loss: Tensor) -> Tensor:
        trained = self.params[: len(self.params) - len(self.buffers)]
        return torch.cat([derivative(loss, trained), *(torch.zeros(b.numel(), dtype=b.dtype) for b in self.buffers)])

    def dots(self, mean: Tensor, movement: Tensor) -> Tensor:
        """[query, output, layer]"""
        return torch.stack([mean[..., cut] @ movement[cut] for cut in self.layers], dim=-1)

    def of_gradient(self, means: list[Tensor], step: int, g: Tensor) -> Tensor:
        """What g, found at `step`, moved at every step: [query, output, layer, applied]"""
        if self.problem.response is None:
            return self.pushed(means, step, self.moments[step].filter.sign * g)
        later = range(step, len(means))
        return sum(self.pushed(means, t, self.problem.response(step, t) * self.moments[t].filter.sign * g) for t in later)

    def pushed(self, means: list[Tensor], step: int, g: Tensor) -> Tensor:
        """What g, consumed at `step`, moved at every step: [query, output, layer, applied]"""
        f = self.moments[step].filter
        z = f.N * g
        booked = [torch.zeros_like(self.dots(means[0], g))] * step + [self.dots(means[step], -(f.C * z + f.E * g))]
        for later in range(step + 1, len(means)):
            f = self.moments[later].filter
            z = f.M * z
            booked.append(self.dots(means[later], -f.C * z))
        return torch.stack(booked, dim=-1)

    def first_momentum(self, means: list[Tensor]) -> Tensor:
        """What the momentum that the recording began with moved: [query, output, layer]"""
        z, total = self.moments[0].momentum, torch.tensor(0.0)
        for moment, mean in zip(self.moments, means, strict=True):
            z = moment.filter.M * z
            total = total + self.dots(mean, -moment.filter.C * z)
        return total

    def solve(self) -> Reference:
        means = [self.average(moment) for moment in self.moments]
        sizes = (len(self.layers), len(means), len(means))  # layer seen applied
        full = torch.zeros(*means[0].shape[:2], len(cases.DATA), *sizes, dtype=torch.float64)
        decayed = torch.zeros(*means[0].shape[:2], *sizes, dtype=torch.float64)
        for s, moment in enumerate(self.moments):
            for i, share in self.shares(s):
                full[:, :, i, :, s] += self.of_gradient(means, s, share)
            decayed[..., s, :] += self.pushed(means, s, moment.filter.kappa * moment.theta)
            decayed[..., s, s] += self.dots(means[s], -moment.filter.R * moment.theta)
        change = [self.measured(m.after) - self.measured(m.theta) for m in self.moments]
        path = [c - mean @ (m.after - m.theta) for c, mean, m in zip(change, means, self.moments, strict=True)]
        ends = self.measured(self.moments[0].theta), self.measured(self.moments[-1].after)
        kept = sum(b.numel() for b in self.buffers)
        moved = [torch.cat([torch.zeros(len(m.theta) - kept), (m.after - m.theta)[len(m.theta) - kept :]]) for m in self.moments]
        buffers = torch.stack([self.dots(mean, move) for mean, move in zip(means, moved, strict=True)], dim=-1)
        rows = (full, decayed, self.first_momentum(means), buffers, torch.stack(path, dim=-1), *ends)
        return Reference(*(row.detach().numpy() for row in rows))
