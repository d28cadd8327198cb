"""From what the sweeps booked to a ledger: blocks are joined along the measures, and every array gets its named axes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from explaind.axes import ROWS
from explaind.kernel.accounts import Accounts
from explaind.kernel.layout import Layout
from explaind.ledger.ledger import Checks, Ledger, Row, ordered
from explaind.ledger.plan import Plan
from explaind.ledger.sweeping import Swept


def assembled(
    blocks: Sequence[Swept],
    plan: Plan,
    layout: Layout,
    settings: Mapping[str, Any],
    doubts: tuple[str, ...],
    has_gaps: bool = False,
) -> Ledger:
    """Join the blocks along the measures and give every array its named axes."""
    accounts = [block.accounts for block in blocks]
    fine = "param" if plan.wanted.finest == "param" else "layer"
    measure_shape = tuple(plan.sizes[axis] for axis in plan.measure_axes)

    def joined(pick: Callable[[Accounts], Tensor], dims: tuple[str, ...]) -> Row:
        whole = np.concatenate([pick(a).cpu().numpy() for a in accounts], axis=dims.index("measure"))
        return named(whole, dims)

    def named(whole: np.ndarray, dims: tuple[str, ...]) -> Row:
        d = dims.index("measure")
        whole = whole.reshape((*whole.shape[:d], *measure_shape, *whole.shape[d + 1 :]))
        dims = dims[:d] + plan.measure_axes + dims[d + 1 :]
        summed = tuple(i for i, axis in enumerate(dims) if axis not in plan.wanted.keep)
        whole = whole.reshape([n for i, n in enumerate(whole.shape) if i not in summed])
        dims = tuple(axis for axis in dims if axis in plan.wanted.keep)
        order = ordered(dims)
        return Row(order, np.asarray(whole.transpose([dims.index(axis) for axis in order]), order="C"))

    ends = np.concatenate([block.ends.double().cpu().numpy() for block in blocks], axis=1)
    rows = {
        "initial": named(ends[0], ("measure",)),
        "data": joined(lambda a: a.data, ("step", fine, "measure", "example")),
        "decay": joined(lambda a: a.decay, ("step", fine, "measure")),
        "momentum0": joined(lambda a: a.momentum0, (fine, "measure")),
        "arithmetic": joined(lambda a: a.arithmetic, ("step", fine, "measure")),
        "path": joined(lambda a: a.path, ("step", "measure")),
    }
    if any(layout.moving):
        rows["buffers"] = joined(lambda a: a.buffers, ("step", fine, "measure"))
    if has_gaps:
        rows["gap"] = joined(lambda a: a.gap, ("step", fine, "measure"))
    rows = {name: rows[name] for name in ROWS if name in rows}
    first = accounts[0]
    movement, path, arithmetic = (
        joined(pick, ("measure",)) for pick in (lambda a: a.movement, lambda a: a.path_absolute, lambda a: a.arithmetic_absolute)
    )
    checks = Checks(
        movement.array,
        path.array,
        arithmetic.array,
        movement.dims,
        np.sum([a.by_step.cpu().numpy() for a in accounts], axis=0),
        first.replay_error.cpu().numpy(),
        np.array([a.recipes for a in accounts]).T,
        layout.names,
        doubts,
    )
    notes = "; ".join(dict.fromkeys(note for a in accounts for note in a.notes))
    return Ledger(rows, plan.coords, named(ends[1], ("measure",)), {**settings, "rule_note": notes}, checks)
