"""Path rules by name, and the rule that chooses between the others."""

import torch
from torch import Tensor

from explaind.errors import RequestError
from explaind.kernel.measures import Measures
from explaind.kernel.path import Adaptive, Fixed, Kind, PathRule, Recipe, Segment
from explaind.kernel.secant import NoSecant
from explaind.kernel.secant.rules import refuse

PARTS = (1, 2, 4, 8, 16, 32)
"""Numbers of equal parts that are tried for the secant."""
PROBES = 2
SAMPLE = 64
"""Queries on which a secant's split is judged."""
PIECES = 8
"""Least number of pieces of the parameters whose contributions are told apart in a probe."""
EXACT = 1.25
"""What exact closure is worth: a secant is taken up to this many times the cost of a quadrature that only meets the tolerance."""


class Auto:
    """On every step the cheaper of secant ×k and Gauss n that splits δ within tol · max(|δ|, scale); forward passes alone decide.

    The secant closes whatever k is, so its split is judged: in a probe every piece of Δ gets a random sign, and the product of ḡ with
    it is a random combination of the contributions that the ledger tells apart, looked at for some queries. The error of a secant falls
    like 1/k², so that k parts are off by 4/3 of their distance from 2k. A Gauss rule is judged by what it misses of δ for any measure,
    as in ``Adaptive``.
    Where the model holds an operation without a secant rule, `auto` is the adaptive rule, and `note` says why.
    """

    def __init__(self, tol: float) -> None:
        self._adaptive = Adaptive(tol)
        self.name, self.note, self._tol, self._rung = f"auto:{tol:g}", "", tol, 0
        self._without = False

    def choose(self, measures: Measures, segment: Segment) -> Recipe:
        if self._without and not self.note:  # taken up again after the secant was given up
            self.note = measures.why_no_secant(segment.theta, segment.after) or "the secant was given up at a later step"
        if self.note:
            return self._adaptive.choose(measures, segment)
        worth = _cost(measures) / EXACT  # nodes that cost as much as a secant
        # Nodes are searched first: their check costs less than a secant's, and tells how many parts are worth a look.
        nodes = self._few(measures, segment, 2 * worth * PARTS[self._rung])
        if nodes is not None and nodes.count <= worth:
            return nodes
        try:
            if nodes is not None:
                parts = self._parts(measures, segment, nodes.count / worth)
                return Recipe("secant", parts) if parts else nodes
            parts = self._parts(measures, segment)
        except NoSecant as error:
            self.note = str(error)
            return self._adaptive.choose(measures, segment)
        return self._few(measures, segment, worth * parts) or Recipe("secant", parts)

    def _few(self, measures: Measures, s: Segment, most: float) -> Recipe | None:
        """The fewest nodes that meet the tolerance, if at most so many do."""
        if most < 1:
            return None
        nodes = self._adaptive.choose(measures, s, most)
        return nodes if nodes.count <= most else None

    def _parts(self, measures: Measures, s: Segment, below: float = float("inf")) -> int:
        """The fewest equal parts that meet the tolerance, or the most that are tried; 0 where they are limited and no number does."""
        stride = max(1, measures.shape[0] // SAMPLE) if measures.by_query else 1
        probes, known = _probes(measures, s), dict[int, Tensor]()
        allowed = s.allowed(self._tol)
        if stride > 1:
            allowed = allowed.view(measures.shape)[::stride].flatten()

        def split(rung: int) -> Tensor:
            if rung not in known:
                count = PARTS[rung] if rung < len(PARTS) else 2 * PARTS[-1]
                known[rung] = sum(measures.secants(a, b, probes, stride) for a, b in s.parts(count)) / count  # type: ignore[assignment]
            return known[rung]

        def excess(rung: int) -> float:
            off = float(((split(rung) - split(rung + 1)).abs() * (4 / 3) / allowed).max())
            if off != off:
                raise refuse("the secant", "it is not a number on a step")
            return off

        top = sum(parts < below for parts in PARTS) - 1
        rung = min(self._rung, top)
        off = excess(rung)
        while off > 1 and rung < top:
            rung += 1
            off = excess(rung)
        while rung and off < 0.25 and excess(rung - 1) <= 1:
            rung -= 1
        self._rung = rung
        return PARTS[rung] if off <= 1 or below == float("inf") else 0

    def state(self) -> list[int]:
        return [self._rung, int(bool(self.note)), *self._adaptive.state()]

    def restore(self, state: list[int]) -> None:
        self._rung, without, *rest = state
        self._without = bool(without)
        self._adaptive.restore(rest)


def _cost(measures: Measures) -> float:
    """Passes through the model for a secant over those for a node: 2 + 2 forward and 2 backward a measure, against 1 and 2."""
    outputs = measures.count // measures.shape[0] if measures.by_query else measures.count
    return (4 + 2 * outputs) / (1 + 2 * outputs)


def _probes(measures: Measures, s: Segment) -> Tensor:
    """Δ with a random sign for each piece of the parameters, the same in every run: [probe, param]."""
    generator = torch.Generator().manual_seed(s.index)
    pieces = -(-PIECES // len(measures.layout.sizes))
    delta, rows = s.delta, []
    for _ in range(PROBES):
        signs = []
        for size in measures.layout.sizes:
            own = torch.randint(0, 2, (min(pieces, size),), generator=generator) * 2 - 1
            signs.append(own.repeat_interleave(-(-size // len(own)))[:size])
        rows.append(delta * torch.cat(signs).to(delta))
    return torch.stack(rows)


def path_rule(spec: str, tol: float) -> PathRule:
    """The rule that a name such as "auto", "adaptive", "secant:4", "gauss:4" or "midpoint:100" stands for."""
    if spec == "auto":
        return Auto(tol)
    if spec == "adaptive":
        return Adaptive(tol)
    kind, _, number = ("secant:1" if spec == "secant" else spec).partition(":")
    kinds: dict[str, Kind] = {"gauss": "gauss", "midpoint": "midpoint", "secant": "secant"}
    if kind not in kinds or not number.isdigit() or int(number) < 1:
        raise RequestError(
            "unknown path rule",
            expected="auto, adaptive, secant, secant:PARTS, gauss:NODES or midpoint:NODES",
            got=repr(spec),
            do="choose one of these",
        )
    return Fixed(spec, Recipe(kinds[kind], int(number)))
