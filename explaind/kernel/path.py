"""Path rules: the gradient of every measure, averaged over the straight segment of a step.

    <ḡ_q, Δ> ≈ δ_q = h_q(θ + Δ) − h_q(θ),        path_q = δ_q − <ḡ_q, Δ>

δ is known exactly from forward passes, so that a rule's miss is known on every step and for every measure.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from explaind.errors import RequestError
from explaind.kernel.measures import Measures
from explaind.kernel.points import Point

LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of Gauss nodes that the adaptive rule tries."""
STALLED = 4
"""So many rungs without any gain end the search."""
Kind = Literal["gauss", "midpoint", "secant"]


@dataclass(frozen=True)
class Segment:
    """One step of the parameters, with what every measure did on it."""

    theta: Float[Tensor, " param"]
    after: Float[Tensor, " param"]
    change: Float[Tensor, " measure"]
    """δ, exactly."""
    scale: Float[Tensor, " measure"]
    """Mean |δ| of each measure over the steps of the run: below it a relative error means nothing."""
    index: int = 0
    """The step's number."""
    noise: Float[Tensor, " measure"] | float = 0.0
    """What rounding alone makes of δ."""

    @property
    def delta(self) -> Float[Tensor, " param"]:
        """Δ."""
        return self.after - self.theta

    def at(self, t: float) -> Float[Tensor, " param"]:
        """θ + tΔ; the very ends for t = 0 and 1."""
        return self.after if t == 1.0 else self.theta + t * self.delta

    def parts(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The ends of so many equal parts."""
        ends = [self.at(j / count) for j in range(count + 1)]
        return list(pairwise(ends))

    def allowed(self, tol: float) -> Float[Tensor, " measure"]:
        """What a tolerance allows to miss: tol · max(|δ|, scale), and what rounding makes of δ."""
        allowed = tol * torch.maximum(self.change.abs(), self.scale) + self.noise
        return allowed.clamp_min(torch.finfo(allowed.dtype).tiny)


def gauss(n: int) -> tuple[np.ndarray, np.ndarray]:
    """n Gauss–Legendre nodes and weights on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(n)
    return (x + 1) / 2, w / 2


def midpoint(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints of n equal parts (the paper's rule, with n = 100)."""
    return (np.arange(n) + 0.5) / n, np.full(n, 1.0 / n)


@dataclass(frozen=True)
class Recipe:
    """How ḡ of one step is made: so many nodes of a quadrature, or secants of so many equal parts."""

    kind: Kind
    count: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.count}"

    def points(self, measures: Measures, s: Segment) -> list[Point]:
        """What is differentiated; raises NoSecant."""
        if self.kind == "secant":
            return [measures.between(start, end, 1.0 / self.count) for start, end in s.parts(self.count)]
        nodes, weights = (gauss if self.kind == "gauss" else midpoint)(self.count)
        return [measures.node(s.at(float(t)), float(w)) for t, w in zip(nodes, weights, strict=True)]


@runtime_checkable
class PathRule(Protocol):
    """Chooses a recipe for every step."""

    @property
    def name(self) -> str:
        """The rule's own name, with its numbers."""
        ...

    @property
    def note(self) -> str:
        """What a reader of the result should know of the rule's choices, such as why it could not use the secant; often nothing."""
        ...

    def choose(self, measures: Measures, segment: Segment) -> Recipe:
        """The recipe for a step; raises NoSecant."""
        ...

    def state(self) -> list[int]:
        """What the rule remembers of the steps before, so that a sweep can be taken up again."""
        ...

    def restore(self, state: list[int]) -> None:
        """Remember what ``state`` gave."""
        ...


@dataclass(frozen=True)
class Fixed:
    """The same recipe on every step."""

    name: str
    recipe: Recipe
    note: str = ""

    def choose(self, measures: Measures, segment: Segment) -> Recipe:
        return self.recipe

    def state(self) -> list[int]:
        return []

    def restore(self, state: list[int]) -> None:
        pass


class Adaptive:
    """The fewest Gauss nodes whose miss is at most tol · max(|δ|, scale) for every measure, found before any gradient is taken.

    The directional derivative of all measures together is one forward-mode pass, where ḡ costs a backward pass per measure.
    The search starts where the last step's ended, since neighbouring steps are alike; it never returns a rule that it has not
    checked, unless even the longest misses, which the path row then shows.
    """

    note = ""

    def __init__(self, tol: float) -> None:
        if not tol > 0:
            raise RequestError("the tolerance must be positive", expected="tol > 0", got=tol, do="give for instance 1e-3")
        self.name, self._tol, self._rung = f"adaptive:{tol:g}", tol, 1

    def _miss(self, measures: Measures, s: Segment, rung: int) -> float:
        points, weights = gauss(LADDER[rung])
        total, delta = torch.zeros_like(s.change), s.delta
        for t, w in zip(points, weights, strict=True):
            total += w * measures.slopes(s.at(float(t)), delta)
        return float(((s.change - total).abs() / s.allowed(self._tol)).max())

    def choose(self, measures: Measures, segment: Segment, most: float = float("inf")) -> Recipe:
        """As ``PathRule.choose``; the search gives up beyond `most` nodes, with a recipe of more than those."""
        rung = min(self._rung, max((r for r, n in enumerate(LADDER) if n <= most), default=0))
        miss = self._miss(measures, segment, rung)
        if miss <= 1:
            # A Gauss rule gains orders of magnitude a rung: only when there is room is the rung below worth a look.
            while rung and miss < 0.1 and (miss := self._miss(measures, segment, rung - 1)) <= 1:
                rung -= 1
        else:
            stalled = 0  # a miss that more nodes do not lessen is not the quadrature's: the gradient itself is another
            while miss > 1 and rung + 1 < len(LADDER) and stalled < STALLED:
                rung += 1
                if LADDER[rung] > most:
                    break
                before, miss = miss, self._miss(measures, segment, rung)
                stalled = stalled + 1 if miss > 0.9 * before else 0
        self._rung = rung
        return Recipe("gauss", LADDER[rung])

    def state(self) -> list[int]:
        return [self._rung]

    def restore(self, state: list[int]) -> None:
        (self._rung,) = state


def average(
    rule: PathRule, measures: Measures, segment: Segment, mean: Float[Tensor, "measure param"]
) -> tuple[Float[Tensor, " measure"], Recipe]:
    """Puts ḡ of a segment into `mean`; (path, how)."""
    recipe = rule.choose(measures, segment)
    mean.zero_()
    measures.add_gradients(mean, recipe.points(measures, segment), secant=recipe.kind == "secant")
    return segment.change - mean @ segment.delta, recipe


def discrete_gradient(mean: Float[Tensor, "measure param"], path: Float[Tensor, " measure"], delta: Float[Tensor, " param"]) -> Tensor:
    """ḡ + path · Δ / ‖Δ‖², whose product with Δ is δ exactly (Gonzalez 1996)."""
    square = delta @ delta
    return mean + torch.outer(torch.where(square > 0, path / square, 0.0), delta)
