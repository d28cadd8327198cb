"""Figures of the tables that analyses leave: of a run, and of its ledgers."""

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.figure import Figure

from explaind.analysis.curves import Curves
from explaind.analysis.phases import boundaries
from explaind.analysis.similarity import ALL
from explaind.analysis.table import Table
from explaind.report import figures

LOOKS = 5
"""Windows of which one figure has a panel each, at most; evenly spaced."""

Tables = Mapping[str, Table]


def drawn(tables: Tables, measure: str) -> dict[str, Figure]:
    """A figure for each table that there is one for, by name; measure: what credit is for, in a title."""
    kept = {name: table for name, table in tables.items() if len(table)}
    return {name: draw(kept, measure) for name, draw in DRAWN.items() if name in kept}


def _training(tables: Tables, measure: str) -> Figure:
    table = tables["training"]
    splits = [name.removesuffix("_loss") for name in table.columns if name.endswith("_loss")]
    loss, accuracy = ({split: table[f"{split}_{what}"] for split in splits} for what in ("loss", "accuracy"))
    return figures.training(Curves(table["step"], loss, accuracy))


def _progress(tables: Tables, measure: str) -> Figure:
    """Losses with and without the key frequencies, those of the control dashed; sparsity and norm of the weights below."""
    table = tables["progress"]
    control = [name for name in table.columns if name.endswith("_difference")]
    losses = {name: table[name] for name in ("train_loss", "val_loss", "restricted", "excluded", *control)}
    sparse = {name: table[name] for name in table.columns if name.startswith("gini")}
    panels = {"loss, nats": losses, "Gini coefficient": sparse, "Σ θ²": {"squared weights": table["squared_weights"]}}
    return figures.panels(table["step"], panels, "Progress measures", logarithmic=("loss, nats", "Σ θ²"), dashed=control)


def _key_frequencies(tables: Tables, measure: str) -> Figure:
    table = tables["key_frequencies"]
    shares = {name: table[name] for name in ("neurons", "embedding", "decoder")}
    return figures.by_frequency(table["frequency"], shares, table["key"], "The network by frequency, in the end", "share")


def _clock_or_pizza(tables: Tables, measure: str) -> Figure:
    table = tables["clock_or_pizza"]
    told = {"distance irrelevance": table["distance_irrelevance"], "gradient symmetricity": table["gradient_symmetricity"]}
    words = "Clock: distance is irrelevant (1). Pizza: gradients are symmetric (1)"
    return figures.panels(table["step"], {"ratio and cosine": told}, words)


def _layer_shares(tables: Tables, measure: str) -> Figure:
    steps, layers, share = tables["layer_shares"].grid("step", "layer", "share")
    begin = boundaries(tables["phases"]) if "phases" in tables else ()
    words = f"Share of the credit for {measure}" + (", and where phases begin" if len(begin) else "")
    return figures.by_layer(steps, layers.astype(str).tolist(), share, words, "share of Σ |data|", begin)


def _balance(tables: Tables, measure: str) -> Figure:
    steps, layers, balanced = tables["balance"].grid("step", "layer", "balance")
    return figures.by_layer(steps, layers.astype(str).tolist(), balanced, f"Data less decay for {measure}", f"{figures.UNIT} and per entry")


def _similarity(tables: Tables, measure: str) -> Figure:
    """Cosines of all parameters, at some windows; queries in the order of their classes where these are known."""
    table = tables["similarity"].where(layer=ALL)
    found = {step: table.where(step=step).grid("query", "other", "cosine") for step in _looks(table)}
    queries = next(iter(found.values()))[0]
    classes = _classes(tables, queries)
    order = np.arange(len(queries)) if classes is None else np.argsort(classes, kind="stable")
    words = "as decomposed" if classes is None else "by class"
    matrices = {f"from step {step}": matrix[np.ix_(order, order)] for step, (_, _, matrix) in found.items()}
    return figures.matrices(matrices, f"Cosines of the credit for {measure} by parameter; queries {words}", "cosine")


def _kernel_pca(tables: Tables, measure: str) -> Figure:
    table = tables["kernel_pca"]
    points, samples = {}, table["sample"]
    for step in _looks(table):
        _, samples, coordinates = table.where(step=step).grid("component", "sample", "coordinate")
        points[f"from step {step}"] = coordinates[:2] if len(coordinates) > 1 else np.stack([coordinates[0], np.zeros(len(samples))])
    return figures.scatter(points, _classes(tables, samples), f"Principal components of the cosines of the credit for {measure}", "class")


def _spectrum(tables: Tables, measure: str) -> Figure:
    table = tables["spectrum"]
    powers = {f"from step {step}": table.where(step=step)["power"] for step in _looks(table)}
    first = table.where(step=table["step"][0])
    return figures.by_frequency(first["frequency"], powers, first["key"], "Cosines by frequency of the difference of classes", "power")


def _looks(table: Table) -> list[int]:
    steps = np.unique(table["step"])
    return [int(step) for step in steps[np.unique(np.linspace(0, len(steps) - 1, min(LOOKS, len(steps))).round().astype(int))]]


def _classes(tables: Tables, queries: np.ndarray) -> np.ndarray | None:
    """Of these queries; None where the table of classes is not there or is of others."""
    if "classes" not in tables:
        return None
    of = dict(zip(tables["classes"]["query"].tolist(), tables["classes"]["class"].tolist(), strict=True))
    return np.array([of[query] for query in queries.tolist()]) if set(queries.tolist()) <= set(of) else None


DRAWN: Mapping[str, Callable[[Tables, str], Figure]] = {
    "training": _training,
    "progress": _progress,
    "key_frequencies": _key_frequencies,
    "clock_or_pizza": _clock_or_pizza,
    "layer_shares": _layer_shares,
    "balance": _balance,
    "similarity": _similarity,
    "kernel_pca": _kernel_pca,
    "spectrum": _spectrum,
}
"""By the name of the table, which is also the figure's."""
