"""Who moved the predictions, through what, when: shares, balances and scores, read off a ledger."""

from collections.abc import Collection

import numpy as np

from explaind.analysis.table import Table
from explaind.axes import MEASURE_AXES
from explaind.errors import RequestError
from explaind.ledger.ledger import Ledger, Row, ordered

READ_BYTES = 64 << 20
"""How much of a ledger on disk is in memory at once."""


def absolute(row: Row, axes: Collection[str], examples: np.ndarray | None = None) -> np.ndarray:
    """Σ |entry| over all other axes, in float64, in the order of a ledger's axes; read piece by piece.

    examples  places on the example axis, of which alone the sum is; None: of all
    """
    keep = ordered(axes)
    gone = tuple(d for d, axis in enumerate(row.dims) if axis not in keep)
    if not row.dims:
        return np.abs(np.asarray(row.values, dtype=np.float64))
    shape = row.array.shape
    total = np.zeros([n for d, n in enumerate(shape) if d not in gone])
    pieces = max(1, -(-row.array.nbytes // READ_BYTES))
    width = max(1, shape[0] // pieces)
    for start in range(0, shape[0], width):
        part = np.asarray(row.array[start : start + width])
        if examples is not None:
            part = part.take(examples, axis=row.dims.index("example"))
        part = np.abs(part, dtype=np.float64).sum(axis=gone)
        if 0 in gone:
            total += part
        else:
            total[start : start + width] = part
    return total


def net(row: Row, axes: Collection[str]) -> np.ndarray:
    """Σ entry over all other axes, in float64, in the order of a ledger's axes."""
    for axis in row.dims:
        if axis not in axes:
            row = row.sum(axis)
    return np.asarray(row.values, dtype=np.float64)


def layer_shares(ledger: Ledger, examples: np.ndarray | None = None) -> Table:
    """How much of a window's credit went through each layer: one row a step (or window) and layer.

    absolute  Σ over measures and examples of |data|, in the measure's unit
    share     absolute over its sum over layers; 0 where nothing moved
    net       Σ data over all examples, signs kept
    examples  places on the example axis that absolute and share are of, such as a sample of its own entries; None: all
    """
    steps, layers = _coords(ledger, "step", "layer", *(() if examples is None else ("example",)))[:2]
    size = absolute(ledger.rows["data"], ("layer", "step"), examples)
    whole = size.sum(0)
    share = np.divide(size, whole, out=np.zeros_like(size), where=whole > 0)
    return Table(
        "layer_shares",
        "share[layer, step] = Σ_measure,example |data| / Σ_layer,measure,example |data|"
        + ("" if examples is None else f"; sizes are of {len(examples)} entries of the example axis")
        + _view(ledger)
        + _over(ledger),
        "Ranjan et al., ExPLAIND (arXiv 2505.20076): layer influence over steps",
        {
            "step": np.tile(steps, len(layers)),
            "layer": np.repeat(layers, len(steps)),
            "absolute": size.reshape(-1),
            "share": share.reshape(-1),
            "net": net(ledger.rows["data"], ("layer", "step")).reshape(-1),
        },
    )


def sampling_error(ledger: Ledger, examples: np.ndarray, splits: int = 100, seed: int = 0) -> Table:
    """How far shares of a sample of examples are from those of all, from its random halves: one row a step (or window) and layer.

    error  root of the mean over splits of ((share of one half − share of the other) / 2)²: the standard error of the share in the sample
    """
    steps, layers = _coords(ledger, "step", "layer", "example")[:2]
    size = absolute(ledger.rows["data"], ("example", "layer", "step"))[examples]
    generator, total = np.random.default_rng(seed), np.zeros(size.shape[1:])
    for _ in range(splits):
        order = generator.permutation(len(size))
        halves = np.stack([size[half].sum(0) for half in np.array_split(order, 2)])  # [half, layer, step]
        whole = halves.sum(1, keepdims=True)
        one, other = np.divide(halves, whole, out=np.zeros_like(halves), where=whole > 0)
        total += ((one - other) / 2) ** 2
    return Table(
        "sampling_error",
        f"error[layer, step] = √ mean over {splits} random splits of ((share of one half − share of the other) / 2)², of {len(examples)}",
        "explaind: split halves; each half has twice the variance of the whole sample",
        {"step": np.tile(steps, len(layers)), "layer": np.repeat(layers, len(steps)), "error": np.sqrt(total / splits).reshape(-1)},
    )


def balance(ledger: Ledger) -> Table:
    """What data and what weight decay did through each layer, window by window, per measure.

    data, decay  mean over measures of the net credit, in the measure's unit
    balance      data − decay
    """
    steps, layers = _coords(ledger, "step", "layer")
    measures = int(np.prod(ledger.final.array.shape)) or 1
    data, decay = (net(ledger.rows[name], ("layer", "step")).reshape(-1) / measures for name in ("data", "decay"))
    return Table(
        "balance",
        "balance[layer, step] = mean_measure (Σ_example data − decay)" + _view(ledger),
        "Ranjan et al., ExPLAIND (arXiv 2505.20076): balance D(Θ) of data and regularisation, over every tensor of a layer group",
        {
            "step": np.tile(steps, len(layers)),
            "layer": np.repeat(layers, len(steps)),
            "data": data,
            "decay": decay,
            "balance": data - decay,
        },
    )


def step_scores(ledger: Ledger) -> Table:
    """How much the training data moved the measures at each step or window: signs kept, as sizes, and either sign alone."""
    return _scores(ledger, "step")


def example_scores(ledger: Ledger) -> Table:
    """How much each training example moved the measures over the whole training: signs kept, as sizes, and either sign alone."""
    return _scores(ledger, "example")


def _scores(ledger: Ledger, axis: str) -> Table:
    (names,) = _coords(ledger, axis)
    data, measures = ledger.rows["data"], int(np.prod(ledger.final.array.shape)) or 1
    signed, size = net(data, (axis,)) / measures, absolute(data, (axis,)) / measures
    return Table(
        f"{axis}_scores",
        f"net[{axis}] = mean_measure Σ data; absolute = mean_measure Σ |data|; raised and lowered: its positive and its negative part"
        + (_view(ledger) if axis == "step" else "")
        + _over(ledger),
        "Ranjan et al., ExPLAIND (arXiv 2505.20076): step and sample scores, with their signs",
        {axis: names, "net": signed, "absolute": size, "raised": (size + signed) / 2, "lowered": (signed - size) / 2},
    )


def _coords(ledger: Ledger, *axes: str) -> tuple[np.ndarray, ...]:
    for axis in axes:
        if axis not in ledger.axes:
            raise RequestError(
                "the ledger lacks an axis for this analysis",
                expected=" and ".join(axes),
                got=", ".join(ledger.axes) or "no axis",
                do=f"decompose with keep=…,{axis}",
            )
    return tuple(ledger.coords[axis] for axis in axes)


def _view(ledger: Ledger) -> str:
    """Which step credit is given to: the one that saw the gradient, or the one whose momentum applied it."""
    return f"; steps are of the view {ledger.settings['view']}" if "view" in ledger.settings else ""


def _over(ledger: Ledger) -> str:
    """Sizes are taken entry by entry of what was kept; what was summed before has no sign left to lose."""
    summed = [axis for axis in (*MEASURE_AXES, "example", "layer", "step") if axis not in ledger.axes and axis != "output"]
    return f"; summed before sizes were taken: {', '.join(summed)}" if summed else ""
