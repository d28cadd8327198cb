"""When a training changed its way of working: change points of the layer shares, and how far trainings agree on them."""

from collections.abc import Sequence

import numpy as np

from explaind.analysis.table import Table
from explaind.errors import RequestError

SHORTEST = 2
"""Windows of a phase, at least."""
SMOOTH = 1e-9
"""Noise is taken to be at least this part of the signal's variance: below it rounding would decide what another phase is worth."""


def change_points(signal: np.ndarray, phases: int | None = None) -> list[int]:
    """Rows at which another phase begins, ascending: signal [row, channel] is cut where the squared distance to the phases' means is least.

    phases  how many; None: as many as pay for themselves by the Bayesian information criterion, with the noise read off neighbouring rows
    """
    rows, channels = signal.shape
    if rows < 2 * SHORTEST or not np.ptp(signal, axis=0).any():
        return []
    most = min(rows // SHORTEST, 12 if phases is None else phases)
    signal = signal - signal.mean(0)
    import ruptures  # brings all of scipy, which every start of the command line would wait for

    found = ruptures.Dynp(model="l2", min_size=SHORTEST, jump=1).fit(signal)
    if phases is not None:
        return [] if most < 2 else [int(b) for b in found.predict(n_bkps=most - 1)[:-1]]
    # Differences of neighbours hold twice the noise, and little else; their median does not see the jumps.
    noise = np.median(np.square(np.diff(signal, axis=0)), axis=0).sum() / (2 * 0.455)  # 0.455: median of a squared standard normal
    cuts = [[rows], *(found.predict(n_bkps=n) for n in range(1, most))]
    price = max(noise, SMOOTH * signal.var(0).sum()) * np.log(rows)
    costs = [found.cost.sum_of_costs(cut) + price * (1 + 1 / channels) * (len(cut) - 1) for cut in cuts]
    return [int(b) for b in cuts[int(np.argmin(costs))][:-1]]


def phases(shares: Table, count: int | None = None) -> Table:
    """The phases of one training, from its table of layer shares: one row a phase and layer.

    start, stop  steps of the phase, the last one's stop being the start of the last window
    mean         of the layer's share in it
    """
    steps, layers, matrix = shares.grid("step", "layer", "share")
    starts = [0, *change_points(matrix.astype(np.float64), count)]
    stops = [*starts[1:], len(steps)]
    found = [
        (number, steps[start], steps[min(stop, len(steps) - 1)], layer, matrix[start:stop, column].mean())
        for number, (start, stop) in enumerate(zip(starts, stops, strict=True))
        for column, layer in enumerate(layers)
    ]
    columns = zip(*found, strict=True)
    return Table(
        "phases",
        "least Σ_phase Σ_window |share − mean of the phase|², by dynamic programming; the number of phases by BIC unless it is given",
        "Truong, Oudre, Vayatis (2020), Selective review of offline change point detection methods (ruptures)",
        {name: np.array(values) for name, values in zip(("phase", "start", "stop", "layer", "mean"), columns, strict=True)},
    )


def boundaries(table: Table) -> np.ndarray:
    """The steps at which phases begin, the first one left out."""
    return np.unique(table["start"])[1:]


def agreement(tables: Sequence[Table], length: Sequence[int], draws: int = 999, seed: int = 0) -> Table:
    """How far trainings agree on where their phases begin: one row a boundary, in units of each training's own length.

    tables  ``phases`` of every training, all with the same number of phases
    length  steps to divide by, such as the step at which each training had generalised
    p_value of the mean standard deviation over boundaries, against boundaries drawn evenly in each training
    """
    where = [boundaries(table) / steps for table, steps in zip(tables, length, strict=True)]
    counts = {len(found) for found in where}
    if len(counts) != 1 or len(tables) < 2:
        raise RequestError(
            "trainings can be compared when they have equally many phases",
            expected="two or more tables with one number of phases",
            got=[len(found) + 1 for found in where],
            do="ask for phases with a given count",
        )
    places = np.array(where)
    spread, generator = places.std(0, ddof=1), np.random.default_rng(seed)
    top = [float(table["stop"].max()) / steps for table, steps in zip(tables, length, strict=True)]
    null = [np.array([np.sort(generator.uniform(0, end, places.shape[1])) for end in top]).std(0, ddof=1).mean() for _ in range(draws)]
    rarer = (1 + sum(value <= spread.mean() for value in null)) / (1 + draws)
    return Table(
        "phase_agreement",
        "boundary / length of its training: mean, standard deviation, least and most over trainings; p_value of the mean deviation",
        "explaind: Monte Carlo test against evenly drawn boundaries",
        {
            "boundary": np.arange(places.shape[1]),
            "mean": places.mean(0),
            "sd": spread,
            "least": places.min(0),
            "most": places.max(0),
            "p_value": np.full(places.shape[1], rarer),
        },
    )
