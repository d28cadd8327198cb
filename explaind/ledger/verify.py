"""Does a ledger hold? The numbers, and the reasons in words where it does not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from explaind.store.manifest import ROUNDINGS

if TYPE_CHECKING:
    from explaind.ledger.ledger import Checks

CLOSURE = {"float64": 1e-9, "float32": 1e-3}
"""Largest miss of the sum, relative to the size of the numbers in it: rounding of the kernel's dtype over many steps."""
EXPLAINED = 0.99
"""Least share of a measure's movement that must not be in the rest rows."""
REPLAY = 2e-3
"""Largest relative error of a rebuilt update. Rounding of float32 training stays well below, a wrong example well above."""
STANDS_OUT = 30.0
"""A step whose replay error is this many times the median of its run is named even below REPLAY."""
FLOOR = 3e-4
"""… unless it is below this, where float32 rounding of tiny updates varies freely."""


@dataclass(frozen=True)
class Verdict:
    """What ``verify`` found. Arrays are per measure; ``maxima`` holds the worst of each."""

    path: np.ndarray
    """Σ_step |path|, before any closure correction."""
    arithmetic: np.ndarray
    """Σ_step Σ_layer |arithmetic|."""
    movement: np.ndarray
    """Σ_step |δ|, which the two above belong to."""
    closure: np.ndarray
    """|final − sum of all rows|."""
    explained: np.ndarray
    """1 − (path + arithmetic) / movement."""
    replay_error: np.ndarray
    """Relative error of every step's rebuilt update, worst layer: [step]."""
    maxima: Mapping[str, float]
    ok: bool
    reasons: tuple[str, ...]
    early: tuple[str, ...] = ()
    """Those of the reasons that may be because steps are few or small: nothing moved, or rounding of the training is much of what did."""

    @property
    def lasting(self) -> tuple[str, ...]:
        """Reasons that more steps would not take away."""
        return tuple(reason for reason in self.reasons if reason not in self.early)


def verify(checks: "Checks", closure: np.ndarray, size: np.ndarray, settings: Mapping[str, Any]) -> Verdict:
    """Judge the checks of a ledger. closure and size (|final|) have the ledger's measure axes."""
    rest = checks.path + checks.arithmetic
    with np.errstate(divide="ignore", invalid="ignore"):
        explained = np.where(checks.movement > 0, 1 - rest / checks.movement, np.where(rest > 0, -np.inf, 1.0))
    worst = checks.replay_error.max(axis=1, initial=0.0)
    errors = judged(checks.replay_error, settings.get("anchored", ()))
    reasons, early = list(checks.doubts) + replay_words(errors, checks.layers, settings["rounding"]), list[str]()
    if len(reasons) > len(checks.doubts) and settings["model"] != settings["recorded_model"]:
        reasons.append(f"the model given is a {settings['model']}, the run is of a {settings['recorded_model']}")
    allowed = CLOSURE[settings["dtype"]] * (1 + np.max(size, initial=0) + np.max(checks.movement, initial=0))
    if not np.all(closure <= allowed):
        reasons.append(
            f"the rows do not sum to the final value: off by {closure.max():.3g}, where {allowed:.3g} would be rounding; "
            "an array of the ledger was changed"
        )
    wanted = min(EXPLAINED, 1 - max(settings["rounding"], default=0.0))
    if not np.all(explained >= wanted):
        reasons.append(
            f"explained is {explained.min():.4g} for the worst measure (at least {wanted} wanted): |path| is "
            f"{_share(checks.path, checks.movement)} and |arithmetic| {_share(checks.arithmetic, checks.movement)} of its movement"
            + ("; lower tol" if np.max(checks.path) > np.max(checks.arithmetic) else "")
        )
        if np.all(checks.path <= np.maximum(allowed, (1 - wanted) * checks.movement)):
            early.append(reasons[-1])
    if checks.movement.size and not np.any(checks.movement):
        reasons.append("no measure moved at any step: does the measure call the model that it is given?")
        early.append(reasons[-1])
    maxima = {
        "path": float(np.max(checks.path, initial=0)),
        "arithmetic": float(np.max(checks.arithmetic, initial=0)),
        "movement": float(np.max(checks.movement, initial=0)),
        "closure": float(np.max(closure, initial=0)),
        "unexplained": float(1 - np.min(explained, initial=1)),
        "replay_error": float(worst.max(initial=0)),
        "path_share": float(np.max(checks.path / np.maximum(checks.movement, np.finfo(float).tiny), initial=0)),
        "arithmetic_share": float(np.max(checks.arithmetic / np.maximum(checks.movement, np.finfo(float).tiny), initial=0)),
    }
    rows = checks.path, checks.arithmetic, checks.movement, closure, explained, worst
    return Verdict(*rows, maxima, not reasons, tuple(reasons), tuple(early))


def _share(part: np.ndarray, whole: np.ndarray) -> str:
    return f"{float(np.max(part / np.maximum(whole, np.finfo(float).tiny))):.2%}"


def judged(error: np.ndarray, anchored: Sequence[int]) -> np.ndarray:
    """A [step, layer] table without the steps that end at a stored state of a thin run, whose size is told in another way."""
    out = error.copy()
    out[list(anchored)] = 0.0
    return out


def replay_words(error: np.ndarray, layers: Sequence[str], rounding: Sequence[float]) -> list[str]:
    """What a [step, layer] table of relative replay errors says of the run, the data and the model.

    rounding [layer]: what is no fault in any case, see ``Rule.rounding``. Of a run that autocast rounded, and that is replayed to the
    last number as a whole, a step may be off by a single rounding.
    """
    typical = float(np.median(error.max(axis=1, initial=0.0))) if len(error) else 0.0
    allowed = np.asarray(rounding) / (ROUNDINGS if typical <= FLOOR / STANDS_OUT else 1.0)
    error = np.where(error <= allowed, 0.0, error)  # a nan stays one
    worst = error.max(axis=1, initial=0.0)
    if not len(worst):
        return []
    median = float(np.median(worst))
    limit = REPLAY if median > FLOOR / STANDS_OUT else max(FLOOR, STANDS_OUT * median)
    bad = np.flatnonzero(~(worst <= limit))
    if not len(bad):
        return []
    s = int(bad[np.argmax(np.nan_to_num(worst[bad], nan=np.inf))])
    layer = layers[int(np.argmax(error[s]))]
    where = f"{len(bad)} of {len(worst)} steps (worst: step {s}, {layer}, off by {worst[s]:.2g} of its update)"
    if np.median(worst) > 0.1:
        cause = (
            "the replayed gradients do not give the recorded updates: another model, loss, reduction, precision or data than in training, "
            "or an optimizer whose state was changed by hand"
        )
    elif len(bad) <= 2:
        cause = (
            "an update does not follow from the state before it: a state was changed, or a step removed, after the recording, "
            "or the optimizer's state changed by hand"
        )
    else:
        cause = "some of their examples are not the ones that were trained on (a label or an input), or the loss or its precision differs"
    return [f"replay differs from the record at {where}: {cause}"]
