"""Which predictions were made in the same way: cosines of their credit over single parameters, and what is periodic in them."""

from collections.abc import Mapping, Sequence

import numpy as np

from explaind.analysis.credit import net
from explaind.analysis.table import Table
from explaind.errors import RequestError
from explaind.ledger.ledger import Ledger
from explaind.store.manifest import Layer

ALL = "all"
"""The group of all parameters."""


def score_vectors(ledger: Ledger) -> tuple[np.ndarray, np.ndarray]:
    """Credit of every parameter for every query, window by window: (steps [step], scores [step, query, param]).

    The data row summed over examples and outputs, signs kept; without a step axis there is one window, the whole training.
    """
    missing = [axis for axis in ("query", "param") if axis not in ledger.axes]
    if missing:
        raise RequestError(
            "the ledger lacks an axis for this analysis",
            expected="query and param",
            got=", ".join(ledger.axes) or "no axis",
            do=f"decompose with keep=query,param{',step' if 'step' in ledger.axes else ''}",
        )
    scores = net(ledger.rows["data"], [axis for axis in ("query", "param", "step") if axis in ledger.axes])
    if "step" not in ledger.axes:
        return np.zeros(1, dtype=np.int64), scores[None]
    return ledger.coords["step"], np.moveaxis(scores, -1, 0)


def cosines(scores: np.ndarray) -> np.ndarray:
    """<u, v> / (|u| |v|) of every two rows: [row, param] -> [row, row]; 0 where a row is 0."""
    norms = np.linalg.norm(scores, axis=1, keepdims=True)
    unit = np.divide(scores, norms, out=np.zeros_like(scores), where=norms > 0)
    return unit @ unit.T


def similarity(
    ledger: Ledger, layers: Sequence[Layer], groups: Mapping[str, Sequence[str]] | None = None, steps: Sequence[int] | None = None
) -> Table:
    """Cosine similarity between the credit of every two queries, by window and group of layers.

    layers  of the run (``run.manifest.layers``), in the order of the param axis
    groups  {name: names of layers}; by default every layer, and all of them together
    steps   windows to look at, by the first step of each; by default all
    """
    starts, scores = score_vectors(ledger)
    windows = _windows(starts, steps)
    return similarity_of(starts[windows], scores[windows], ledger.coords["query"], layers, groups)


def similarity_of(
    starts: np.ndarray, scores: np.ndarray, queries: np.ndarray, layers: Sequence[Layer], groups: Mapping[str, Sequence[str]] | None = None
) -> Table:
    """``similarity`` of scores [window, query, param] that are there, such as those of ``applied.window_scores``."""
    whole = {ALL: [layer.name for layer in layers]}
    chosen = {**{layer.name: [layer.name] for layer in layers}, **whole} if groups is None else {**groups, **whole}
    found: dict[str, list[np.ndarray]] = {"step": [], "layer": [], "query": [], "other": [], "cosine": []}
    for start, of_window in zip(starts, scores, strict=True):
        for name, members in chosen.items():
            columns = np.concatenate([np.arange(x.offset, x.offset + x.size) for x in layers if x.name in members])
            matrix = cosines(of_window[:, columns])
            found["step"].append(np.full(matrix.size, start))
            found["layer"].append(np.full(matrix.size, name))
            found["query"].append(np.repeat(queries, len(queries)))
            found["other"].append(np.tile(queries, len(queries)))
            found["cosine"].append(matrix.reshape(-1))
    return Table(
        "similarity",
        "cosine[step, layer, query, other] = <u, v> / (|u| |v|), u and v the data credit of the two queries by parameter, signs kept",
        "Ranjan et al., ExPLAIND (arXiv 2505.20076): cosine similarity of parameter-wise scores",
        {name: np.concatenate(values) for name, values in found.items()},
    )


def _windows(starts: np.ndarray, steps: Sequence[int] | None) -> list[int]:
    if steps is None:
        return list(range(len(starts)))
    missing = [step for step in steps if step not in starts]
    if missing:
        raise RequestError(
            "no window begins at this step", expected=f"some of {starts.tolist()}", got=missing[0], do="name the first steps of windows"
        )
    return [int(np.flatnonzero(starts == step)[0]) for step in steps]


def spectrum(matrix: np.ndarray, classes: np.ndarray, p: int) -> np.ndarray:
    """How periodic a similarity is in the difference of classes mod p: [frequency], for frequencies 1 … (p − 1) / 2.

    S_k = mean over pairs of different samples of matrix[i, j] · cos(2π k (c_i − c_j) / p), twice: the coefficient of that cosine where
    differences are spread evenly. matrix [sample, sample], classes [sample] in 0 … p − 1.
    """
    apart = ~np.eye(len(classes), dtype=bool)
    off = matrix[apart]
    # Every difference of classes has one angle: what is at it is summed first.
    at = np.bincount(((classes[:, None] - classes[None, :]) % p)[apart], off - off.mean(), p)
    frequencies = np.arange(1, (p - 1) // 2 + 1)
    found: np.ndarray = 2 / len(off) * np.cos(2 * np.pi * (frequencies[:, None] * np.arange(p) % p) / p) @ at
    return found


def agreement(matrix: np.ndarray, classes: np.ndarray, p: int, frequencies: Sequence[int], shuffles: int = 999, seed: int = 0) -> Table:
    """Whether a similarity is periodic at the given frequencies, against classes dealt to the samples at random.

    excess  mean S_k over the given frequencies minus that over all others (``spectrum``)
    p_value (1 + number of shuffles with at least this excess) / (1 + shuffles)
    """
    keys = np.asarray(sorted(set(frequencies)))
    most = (p - 1) // 2
    if not len(keys) or keys.min() < 1 or keys.max() > most or len(keys) == most:
        raise RequestError(
            "these are no frequencies to compare", expected=f"some of 1 … {most}, not all", got=list(frequencies), do="give key frequencies"
        )
    chosen = np.isin(np.arange(1, most + 1), keys)

    def excess(of: np.ndarray) -> float:
        power = spectrum(matrix, of, p)
        return float(power[chosen].mean() - power[~chosen].mean())

    generator = np.random.default_rng(seed)
    found = excess(classes)
    null = np.array([excess(generator.permutation(classes)) for _ in range(shuffles)])
    return Table(
        "frequency_agreement",
        "excess = mean S_k at the key frequencies − mean S_k at the others; p_value = (1 + #{shuffles ≥ excess}) / (1 + shuffles)",
        "explaind: permutation test with shuffled labels",
        {
            "excess": np.array([found]),
            "null_mean": np.array([null.mean()]),
            "null_sd": np.array([null.std()]),
            "p_value": np.array([(1 + (null >= found).sum()) / (1 + shuffles)]),
            "shuffles": np.array([shuffles]),
        },
    )


def kernel_pca(matrix: np.ndarray, samples: np.ndarray, components: int = 4) -> Table:
    """Principal components of samples that are known by a kernel alone: one row a component and sample.

    matrix      [sample, sample], symmetric, such as cosines
    coordinate  √λ times the sample's entry of the eigenvector of the centred kernel
    variance    λ over the sum of the positive λ
    """
    count = len(matrix)
    centring = np.eye(count) - 1.0 / count
    values, vectors = np.linalg.eigh(centring @ ((matrix + matrix.T) / 2) @ centring)
    order = np.argsort(-values)[: min(components, count)]
    share = values[order] / values[values > 0].sum() if (values > 0).any() else np.zeros(len(order))
    coordinates = np.sqrt(np.maximum(values[order], 0.0)) * vectors[:, order]
    coordinates *= np.where(
        coordinates[np.abs(coordinates).argmax(0), np.arange(len(order))] < 0, -1.0, 1.0
    )  # a sign that is always the same
    return Table(
        "kernel_pca",
        "coordinate = √λ v of the centred kernel (I − 1/n) K (I − 1/n); variance = λ / Σ positive λ",
        "Schölkopf, Smola, Müller (1998), Nonlinear component analysis as a kernel eigenvalue problem",
        {
            "component": np.repeat(np.arange(len(order)), count),
            "sample": np.tile(samples, len(order)),
            "coordinate": coordinates.T.reshape(-1),
            "variance": np.repeat(share, count),
        },
    )
