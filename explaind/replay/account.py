"""How exactly a thin run was lived again."""

from dataclasses import dataclass, field

import numpy as np

ALLOWED = 2e-3
"""Largest difference of a stretch from the next stored state, relative to what the stretch moved, that other arithmetic explains."""


@dataclass
class Account:
    """Of every stretch that was lived: how many of its steps were bitwise, and how far it was from the next stored state."""

    steps: dict[int, int] = field(default_factory=dict)
    """By the first step of the stretch."""
    exact: dict[int, int] = field(default_factory=dict)
    miss: dict[int, float] = field(default_factory=dict)
    """Relative to what the stretch moved; nan where no state is stored at its end."""

    def take(self, start: int, exact: list[bool], before: np.ndarray, lived: np.ndarray, stored: np.ndarray | None) -> None:
        """A stretch was lived from parameters `before` to `lived`; stored: those of the training, where they are known. All [param]."""
        self.steps[start], self.exact[start] = len(exact), sum(exact)
        self.miss[start] = np.nan if stored is None else _relative(lived, stored, before)

    @property
    def bitwise(self) -> bool:
        """Whether every step was."""
        return self.steps == self.exact

    @property
    def worst(self) -> float:
        """Largest difference; 0 where none is known."""
        return float(np.nanmax([0.0, *self.miss.values()]))

    @property
    def anchored(self) -> list[int]:
        """Steps whose update ends at a stored state that was not quite reached: they are as far off as the whole stretch before them."""
        ends = [start + steps - 1 for start, steps in self.steps.items() if self.exact[start] < steps and self.miss[start] <= ALLOWED]
        return sorted(ends)

    @property
    def note(self) -> str:
        """In words."""
        if not self.steps:
            return ""
        steps, exact = sum(self.steps.values()), sum(self.exact.values())
        if steps == exact:
            return f"a thin run: all {steps} steps were lived again bitwise"
        return (
            f"a thin run: {steps - exact} of {steps} steps were not lived again bitwise (other threads, device or order of sums), "
            f"off by {self.worst:.2g} of what a stretch moved at most where its end is stored; that difference stands in arithmetic"
        )

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the steps in between may not be those of the training."""
        if self.worst <= ALLOWED:
            return ()
        start = max(self.miss, key=lambda s: np.nan_to_num(self.miss[s]))
        return (
            f"lived again, the steps from {start} on lead elsewhere than in training: off by {self.worst:.2g} of what they moved, "
            f"where {ALLOWED:g} would be arithmetic: another model, loss or data, or something done to its gradients",
        )


def _relative(lived: np.ndarray, stored: np.ndarray, before: np.ndarray) -> float:
    miss, moved = (float(np.linalg.norm(stored.astype(np.float64) - other)) for other in (lived, before))
    return miss / moved if moved else miss
