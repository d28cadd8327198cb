"""The result: named rows whose sum is the prediction.

final = initial + data + decay + momentum0 + buffers + gap + arithmetic + path        (each summed over all axes but query and output)

buffers is there for runs in which buffers moved (running statistics), gap for runs of which only windows of steps were recorded.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from explaind.axes import KEEPABLE, MEASURE_AXES
from explaind.errors import RequestError
from explaind.ledger.verify import Verdict, verify

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True)
class Row:
    """One named term: its axes and its values, in memory or still on disk."""

    dims: tuple[str, ...]
    array: Any  # numpy array or zarr array

    @property
    def values(self) -> np.ndarray:
        """All of it, in memory."""
        return np.asarray(self.array[...])

    def sum(self, axis: str) -> "Row":
        """Without one axis; in float64, read slice by slice so that a lazy row need not fit in memory."""
        d = self.dims.index(axis)
        if isinstance(self.array, np.ndarray):
            total = self.array.sum(axis=d, dtype=np.float64)
        else:
            total = np.zeros(self.array.shape[:d] + self.array.shape[d + 1 :])
            width = max(1, (64 << 20) * self.array.shape[d] // max(1, self.array.nbytes))
            for start in range(0, self.array.shape[d], width):
                cut = (slice(None),) * d + (slice(start, start + width),)
                total = total + np.asarray(self.array[cut]).sum(axis=d, dtype=np.float64)
        return Row(self.dims[:d] + self.dims[d + 1 :], total)


@dataclass(frozen=True)
class Checks:
    """Sizes of the rest rows, taken step by step before any closure correction and over absolute values.

    The first four have the axes of a measure that the ledger was decomposed with, and stay as they are when an axis is summed.
    """

    movement: np.ndarray
    """Σ_step |δ|, in the measure's unit."""
    path: np.ndarray
    """Σ_step |path|."""
    arithmetic: np.ndarray
    """Σ_step Σ_layer |arithmetic|."""
    dims: tuple[str, ...]
    """Axes of the three above."""
    by_step: np.ndarray
    """|δ|, |path| and |arithmetic| of every single step, summed over measures: [step, 3]."""
    replay_error: np.ndarray
    """How far each rebuilt update is from the recorded one, see ``Rebuilt.relative_error``: [step, layer], for every single step."""
    recipes: np.ndarray
    """What the path rule did, such as "gauss:4" or "secant:1": [step, block of queries]."""
    layers: tuple[str, ...]
    doubts: tuple[str, ...]
    """What was wrong with the run or the data before a number was computed, in words."""


@dataclass(frozen=True)
class Ledger:
    """Named rows over the axes kept, with their coordinates, settings and checks.

    coords   one array per axis: query and output counted from 0, example ids, layer names, first step of each window
    settings how it was computed (rule, tolerance, view, …) and of which run
    """

    rows: Mapping[str, Row]
    coords: Mapping[str, np.ndarray]
    final: Row
    settings: Mapping[str, Any]
    checks: Checks

    def __getitem__(self, row: str) -> np.ndarray:
        """Values of a row (``ledger["data"]``), or of ``final``."""
        if row == "final":
            return self.final.values
        if row not in self.rows:
            raise RequestError(
                "no such row in the ledger", expected=", ".join((*self.rows, "final")), got=repr(row), do="name one of these"
            )
        return self.rows[row].values

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes kept, in the order of the data row."""
        return self.rows["data"].dims

    def __repr__(self) -> str:
        shape = ", ".join(f"{axis}: {len(self.coords[axis])}" for axis in self.axes)
        return f"Ledger({shape}; {', '.join(self.rows)})"

    def sum(self, *axes: str) -> "Ledger":
        """Drop axes: a smaller ledger with the same checks. Summing ``query`` or ``output`` sums the measures too."""
        ledger = self
        for axis in axes:
            if axis not in self.axes:
                raise RequestError(
                    "the ledger has no such axis to sum", expected=", ".join(self.axes) or "none left", got=axis, do="name a kept axis"
                )
            rows = {name: row.sum(axis) if axis in row.dims else row for name, row in ledger.rows.items()}
            final = ledger.final.sum(axis) if axis in ledger.final.dims else ledger.final
            coords = {name: values for name, values in ledger.coords.items() if name != axis}
            ledger = replace(ledger, rows=rows, final=final, coords=coords)
        return ledger

    def total(self, row: str) -> np.ndarray:
        """A row summed over everything but query and output, in float64."""
        term = self.rows[row]
        for axis in term.dims:
            if axis not in MEASURE_AXES:
                term = term.sum(axis)
        return np.asarray(term.values, dtype=np.float64)

    def verify(self) -> Verdict:
        """Check that the sum closes, that the rest rows are small, and that the replay is the recorded training."""
        closure = np.abs(self.final.values - sum(self.total(name) for name in self.rows))
        return verify(self.checks, closure, np.abs(self.final.values), self.settings)

    def to_xarray(self) -> "xarray.Dataset":
        """One variable a row, and ``final``; dims named by the axes kept. Needs xarray."""
        try:
            import xarray
        except ImportError as error:
            raise RequestError("to_xarray needs xarray", do="pip install 'explaind-ledger[xarray]'") from error
        variables = {name: (row.dims, row.values) for name, row in {**self.rows, "final": self.final}.items()}
        return xarray.Dataset(variables, coords={name: (name, values) for name, values in self.coords.items()}, attrs=dict(self.settings))


def ordered(axes: Collection[str]) -> tuple[str, ...]:
    """Axes in the order in which a ledger's arrays have them."""
    return tuple(axis for axis in KEEPABLE if axis in axes)
