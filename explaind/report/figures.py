"""Figures of a run and of a ledger. Each function returns a matplotlib Figure; nothing is drawn through global state."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from explaind.analysis.curves import Curves

FOR, AGAINST, NEUTRAL = "#2a7f62", "#b5402f", "#5b6770"
"""Raises the measure; lowers it; neither."""
UNIT = "credit, in the measure's unit"
NAMED_LINES = 10
"""So many lines of one figure can be told apart."""
CURVES = {"train": "#1f5fa8", "val": "#d17b0f"}


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def training(curves: Curves) -> Figure:
    """Loss (logarithmic) and accuracy of each split over the steps."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for split in curves.loss:
        colour = CURVES.get(split, NEUTRAL)
        upper.plot(curves.steps, curves.loss[split], color=colour, label=split)
        lower.plot(curves.steps, curves.accuracy[split], color=colour, label=split)
    upper.set(yscale="log", ylabel="mean loss")
    lower.set(ylabel="accuracy", xlabel="step", ylim=(-0.02, 1.02))
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    upper.legend(frameon=False)
    return figure


def waterfall(names: Sequence[str], values: Sequence[float], title: str, unit: str) -> Figure:
    """From the first value (initial) through the terms to their sum: each bar begins where the one before it ended."""
    ends = np.cumsum(values)
    starts = np.concatenate([[0.0], ends[:-1]])
    figure, axes = _axes(8, 0.32 * (len(names) + 1) + 1.4)
    places = np.arange(len(names))
    colours = [NEUTRAL if i == 0 else FOR if v >= 0 else AGAINST for i, v in enumerate(values)]
    axes.barh(places, values, left=starts, color=colours, height=0.7)
    axes.barh(len(names), ends[-1], color=NEUTRAL, height=0.7)
    span = float(np.ptp(np.concatenate([starts, ends]))) or 1.0
    for place, start, value in zip([*places, len(names)], [*starts, 0.0], [*values, ends[-1]], strict=True):
        right = max(start, start + value)
        axes.annotate(f"{value:+.3g}", (right + 0.01 * span, place), va="center", fontsize=8)
    axes.set_yticks([*places, len(names)], [*names, "final"])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.6)
    axes.use_sticky_edges = False  # else a bar that ends at a limit of the axes hides its end
    axes.margins(x=0.12, y=0.01)
    axes.set(title=title, xlabel=unit)
    return figure


def heat_map(credit: np.ndarray, layers: Sequence[str], steps: np.ndarray, title: str, unit: str) -> Figure:
    """Credit [layer, step]: which layers moved the measure, and when; colours are symmetric around 0, cut at the 99th percentile."""
    figure, axes = _axes(9, 0.28 * len(layers) + 1.8)
    limit = float(np.quantile(np.abs(credit), 0.99)) or 1.0
    width = float(steps[1] - steps[0]) if len(steps) > 1 else 1.0
    edges = np.concatenate([steps, [steps[-1] + width]])
    image = axes.pcolormesh(edges, np.arange(len(layers) + 1), credit, cmap="PiYG", vmin=-limit, vmax=limit)
    axes.set_yticks(np.arange(len(layers)) + 0.5, list(layers))
    axes.invert_yaxis()
    axes.set(title=title, xlabel="step")
    figure.colorbar(image, ax=axes, label=unit, extend="both")
    return figure


def by_layer(steps: np.ndarray, layers: Sequence[str], values: np.ndarray, title: str, unit: str, begin: Collection[float] = ()) -> Figure:
    """One line a layer over the steps: values [step, layer]; those that were largest at any time have a name of their own.

    begin  steps at which phases begin, as dotted lines
    """
    figure, axes = _axes(9, 4.2)
    order = np.argsort(-np.abs(values).max(0, initial=0.0), kind="stable")
    for place, column in enumerate(order.tolist()):
        named = place < NAMED_LINES
        axes.plot(
            steps, values[:, column], color=f"C{place}" if named else "#c9ced3", label=layers[column] if named else None, linewidth=1.4
        )
    axes.axhline(0, color="black", linewidth=0.5)
    for step in begin:
        axes.axvline(step, color=NEUTRAL, linewidth=1, linestyle=":")
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def strongest(labels: Sequence[str], credits: Sequence[float], title: str, unit: str) -> Figure:
    """The examples of highest and lowest credit, with their labels, best first."""
    figure, axes = _axes(7, 0.28 * len(labels) + 1.4)
    axes.barh(np.arange(len(labels)), credits, color=[FOR if c >= 0 else AGAINST for c in credits])
    axes.set_yticks(np.arange(len(labels)), list(labels))
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set(title=title, xlabel=unit)
    return figure


def rest_rows(by_step: np.ndarray, title: str, unit: str) -> Figure:
    """|path| and |arithmetic| of every step beside the movement |δ| that they belong to; by_step [step, 3] in that order."""
    figure, axes = _axes(8, 4)
    tiny = float(by_step[by_step > 0].min()) if (by_step > 0).any() else 1.0
    for column, (name, colour) in enumerate((("movement |δ|", NEUTRAL), ("|path|", AGAINST), ("|arithmetic|", CURVES["train"]))):
        axes.plot(np.maximum(by_step[:, column], tiny), color=colour, label=name, linewidth=1)
    axes.set(yscale="log", xlabel="step", ylabel=f"sum over measures, {unit}", title=title)
    axes.legend(frameon=False)
    return figure


def panels(
    steps: np.ndarray,
    values: Mapping[str, Mapping[str, np.ndarray]],
    title: str,
    logarithmic: Collection[str] = (),
    dashed: Collection[str] = (),
) -> Figure:
    """Named lines over the steps, in one panel for each unit: values {unit: {name: [step]}}; the units and the names that are special."""
    figure = Figure(figsize=(8, 1.2 + 2.4 * len(values)), layout="constrained")
    for place, (unit, lines) in enumerate(values.items()):
        axes = figure.add_subplot(len(values), 1, place + 1)
        axes.spines[["top", "right"]].set_visible(False)
        for name, line in lines.items():
            axes.plot(steps, line, label=name.replace("_", " "), linewidth=1.3, linestyle="--" if name in dashed else "-")
        axes.set(ylabel=unit, yscale="log" if unit in logarithmic else "linear")
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set(xlabel="step")
    figure.suptitle(title)
    return figure


def by_frequency(frequencies: np.ndarray, values: Mapping[str, np.ndarray], key: np.ndarray, title: str, unit: str) -> Figure:
    """Named values [frequency] side by side, key frequencies shaded: key bool[frequency]."""
    figure, axes = _axes(9, 3.6)
    for frequency in frequencies[key]:
        axes.axvspan(frequency - 0.5, frequency + 0.5, color=NEUTRAL, alpha=0.15, linewidth=0)
    width = 0.8 / len(values)
    for place, (name, bars) in enumerate(values.items()):
        axes.bar(frequencies + (place - (len(values) - 1) / 2) * width, bars, width, label=name)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(title=title, xlabel="frequency (shaded: key frequencies)" if key.any() else "frequency", ylabel=unit)
    axes.legend(frameon=False, fontsize=7)
    return figure


def matrices(values: Mapping[str, np.ndarray], title: str, unit: str) -> Figure:
    """Named matrices of numbers in [−1, 1] beside each other."""
    figure = Figure(figsize=(1.5 + 2.6 * len(values), 3.4), layout="constrained")
    for place, (name, matrix) in enumerate(values.items()):
        axes = figure.add_subplot(1, len(values), place + 1)
        image = axes.imshow(matrix, cmap="PiYG", vmin=-1, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_title(name, fontsize=9)
    figure.colorbar(image, ax=figure.axes, label=unit)
    figure.suptitle(title, fontsize=10)
    return figure


def scatter(points: Mapping[str, np.ndarray], classes: np.ndarray | None, title: str, unit: str) -> Figure:
    """Named sets of points [2, sample] beside each other, coloured by class around a circle where classes are known."""
    figure = Figure(figsize=(1.5 + 2.8 * len(points), 3.4), layout="constrained")
    for place, (name, (across, up)) in enumerate(points.items()):
        axes = figure.add_subplot(1, len(points), place + 1)
        axes.spines[["top", "right"]].set_visible(False)
        colour = {"color": NEUTRAL} if classes is None else {"c": classes, "cmap": "hsv"}
        image = axes.scatter(across, up, s=14, **colour)
        axes.set_title(name, fontsize=9)
        axes.set(xlabel="component 1", ylabel="component 2" if place == 0 else "")
    if classes is not None:
        figure.colorbar(image, ax=figure.axes, label=unit)
    figure.suptitle(title, fontsize=10)
    return figure
