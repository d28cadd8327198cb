"""Which axes a result keeps, how large it is, and whether that fits."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import combinations
from math import prod

from explaind.axes import KEEPABLE
from explaind.errors import RequestError
from explaind.kernel.products import Finest


@dataclass(frozen=True)
class Resolution:
    """The axes of a ledger and how steps are grouped and counted.

    view     "seen": a step is the one at which an example's gradient was computed;
             "applied": the one at which its momentum moved the parameters (the paper's index)
    windows  steps per entry of the step axis
    """

    keep: frozenset[str]
    steps: int
    view: str = "seen"
    windows: int = 1

    @property
    def finest(self) -> Finest:
        """How far parameters are told apart."""
        return "param" if "param" in self.keep else "layer" if "layer" in self.keep else "none"

    @property
    def step_entries(self) -> int:
        """Length of the step axis (1 where it is summed)."""
        return -(-self.steps // self.windows) if "step" in self.keep else 1

    def entry(self, step: int) -> int:
        """Where on the step axis a step is booked."""
        return step // self.windows if "step" in self.keep else 0


def resolution(keep: Collection[str], steps: int, view: str, windows: int) -> Resolution:
    """Check what a user asked for; RequestError in one line."""
    axes = {keep} if isinstance(keep, str) else set(keep)
    unknown = sorted(axes - set(KEEPABLE))
    if unknown:
        raise RequestError(
            "keep holds an unknown axis", expected=f"some of {', '.join(KEEPABLE)}", got=unknown[0], do="name the axes to keep"
        )
    if {"layer", "param"} <= axes:
        raise RequestError("keep holds both 'layer' and 'param'", expected="one of them: param is the finer layer axis", do="drop one")
    if view not in ("seen", "applied"):
        raise RequestError("unknown view of steps", expected="'seen' or 'applied'", got=repr(view), do="choose one of these")
    if windows < 1:
        raise RequestError(
            "windows must hold at least one step", expected="windows >= 1", got=windows, do="give the number of steps per window"
        )
    if windows > 1 and "step" not in axes:
        raise RequestError(
            "windows group the step axis, which is not kept", got=f"windows={windows}", do="add 'step' to keep or drop windows"
        )
    return Resolution(frozenset(axes), steps, view, windows)


def size(axes: Collection[str], sizes: Mapping[str, int], itemsize: int) -> int:
    """Bytes of the data row with these axes."""
    return itemsize * prod(sizes[axis] for axis in axes)


def words(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}" if count < 1e5 else f"{count:.0f} {unit}"
        count /= 1024
    raise AssertionError


def check_budget(keep: Collection[str], sizes: Mapping[str, int], itemsize: int, budget: int) -> None:
    """RequestError with the size, and the smallest sets of axes whose sum would fit, when the result is over the budget."""
    total = size(keep, sizes, itemsize)
    if total <= budget:
        return
    fits: list[str] = []
    for drop in range(1, len(keep) + 1):
        for gone in combinations([axis for axis in KEEPABLE if axis in keep], drop):
            left = size(set(keep) - set(gone), sizes, itemsize)
            if left <= budget:
                fits.append(f"{'+'.join(gone)} ({words(left)})")
        if fits:
            break
    shape = " × ".join(f"{sizes[axis]} {axis}" for axis in KEEPABLE if axis in keep)
    raise RequestError(
        "the result is larger than the budget",
        where=shape,
        expected=f"at most {words(budget)}",
        got=words(total),
        do=f"sum over {' or '.join(fits)}, group steps with windows, or raise budget",
    )
