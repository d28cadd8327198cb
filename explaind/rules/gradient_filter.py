"""A linear filter of gradients that stands between the backward pass and the optimizer, such as Grokfast's.

Per parameter tensor, with G the gradient of the backward pass and q [slot] what the filter remembers:

    q'_0 = keep q_0 + take G,    q'_j = q_{j−1}
    Ĝ    = G + gain Σ_j q'_j                        what the optimizer consumes

It goes before any rule. Like a rule's coefficients, its own are facts of the run; it is exact in every ledger because it is linear.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from explaind.errors import RuleError
from explaind.rules.filter import Coefficient


@dataclass(frozen=True)
class Passage:
    """One step of a gradient filter over all parameters laid end to end; coefficients are scalars or [param]."""

    keep: Coefficient
    take: Coefficient
    gain: Coefficient
    active: Tensor | None = None
    """Which parameters had a gradient, bool [param]; None: all. The others' memory stays as it is."""

    def advance(self, state: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(q [slot, param], G [param]) -> (q', Ĝ)."""
        after = self._where(torch.cat([(self.keep * state[0] + self.take * gradient)[None], state[:-1]]), state)
        return after, gradient + self.gain * after.sum(0)

    def undo(self, state: Tensor, passed: Tensor) -> Tensor:
        """(q [slot, param], Ĝ [param]) -> G."""
        known = self.keep * state[0] + state[:-1].sum(0)
        return (passed - self.gain * known) / (1.0 + self.gain * self.take)

    def pull(self, costate: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The transpose of ``advance``: from what a unit of q' does later [slot, row, param], and what one of Ĝ does [row, param], to
        what one of G does [row, param], and one of q."""
        after = costate + self.gain * rows
        before = torch.cat([after[1:], torch.zeros_like(after[:1])])
        before[0] += self.keep * after[0]
        return rows + self.take * after[0], self._where(before, after)

    def _where(self, moved: Tensor, still: Tensor) -> Tensor:
        return moved if self.active is None else torch.where(self.active, moved, still)


class GradientFilter(ABC):
    """A filter that a training loop applies to its gradients before every optimizer step; say so to ``explaind.record``."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many tensors it remembers of each parameter."""

    @abstractmethod
    def coefficients(self, seen: int) -> tuple[float, float, float]:
        """keep, take and gain for a parameter of which it has seen so many gradients before."""

    def passage(self, seen: Sequence[int], active: Sequence[bool], sizes: Sequence[int], like: Tensor) -> Passage:
        """Its step; by parameter tensor: gradients seen before, whether there is one now, and sizes."""

        def column(values: Sequence[float]) -> Coefficient:
            if len(set(values)) == 1:
                return values[0]
            return torch.repeat_interleave(like.new_tensor(values), torch.tensor(sizes, device=like.device))

        rows = [self.coefficients(n) if on else (1.0, 0.0, 0.0) for n, on in zip(seen, active, strict=True)]
        keep, take, gain = (column(values) for values in zip(*rows, strict=True))
        on = None if all(active) else torch.repeat_interleave(torch.tensor(active), torch.tensor(sizes)).to(like.device)
        return Passage(keep, take, gain, on)

    def to_json(self) -> dict[str, Any]:
        """Its name and options."""
        return {"name": type(self).__name__, "options": asdict(self)}  # type: ignore[call-overload]  # every filter is a dataclass


@dataclass(frozen=True)
class GrokfastEMA(GradientFilter):
    """``gradfilter_ema``: the gradient plus lamb times its exponential mean (Lee et al., arXiv 2405.20233, algorithm 2)."""

    alpha: float = 0.98
    lamb: float = 2.0

    @property
    def slots(self) -> int:
        return 1

    def coefficients(self, seen: int) -> tuple[float, float, float]:
        # The mean begins with the first gradient itself.
        return (self.alpha, 1.0 - self.alpha, self.lamb) if seen else (0.0, 1.0, self.lamb)


@dataclass(frozen=True)
class GrokfastMA(GradientFilter):
    """``gradfilter_ma``: the gradient plus lamb times the mean, or sum, of the last `window_size` (arXiv 2405.20233, algorithm 1)."""

    window_size: int = 100
    lamb: float = 5.0
    filter_type: str = "mean"
    warmup: bool = True
    """Whether nothing is added before the window is full."""

    def __post_init__(self) -> None:
        if self.filter_type not in ("mean", "sum") or self.window_size < 1:
            raise RuleError(
                "GrokfastMA has no such options",
                expected="filter_type 'mean' or 'sum', window_size ≥ 1",
                got=f"{self.filter_type!r}, {self.window_size}",
                do="give those of gradfilter_ma",
            )

    @property
    def slots(self) -> int:
        return self.window_size

    def coefficients(self, seen: int) -> tuple[float, float, float]:
        held = min(seen + 1, self.window_size)
        if self.warmup and held < self.window_size:
            return 0.0, 1.0, 0.0
        return 0.0, 1.0, self.lamb / held if self.filter_type == "mean" else self.lamb


GRADIENT_FILTERS: dict[str, type[GradientFilter]] = {kind.__name__: kind for kind in (GrokfastEMA, GrokfastMA)}


def gradient_filter(told: Mapping[str, Any]) -> GradientFilter:
    """From ``to_json``; RuleError for one that is not known."""
    try:
        return GRADIENT_FILTERS[told["name"]](**told["options"])
    except (KeyError, TypeError) as error:
        raise RuleError(
            "the run was recorded with an unknown gradient filter",
            expected=f"one of {', '.join(GRADIENT_FILTERS)}",
            got=told,
            do="update explaind",
        ) from error
