"""The figures of the study of grokking."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from explaind.analysis.table import Table


def shares_figure(tables: dict[int, Table]) -> Figure:
    grids = [table.grid("step", "layer", "share") for table in tables.values()]
    steps, layers = grids[0][0], grids[0][1]
    values = np.stack([grid[2] for grid in grids])  # [seed, step, layer]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for column, layer in enumerate(layers):
        if not values[:, :, column].any():  # such as a table of positions that nothing reads
            continue
        axes.plot(steps, values[:, :, column].mean(0), color=f"C{column}", label=layer)
        axes.fill_between(steps, values[:, :, column].min(0), values[:, :, column].max(0), color=f"C{column}", alpha=0.15)
    axes.set(xlabel="step", ylabel="share of Σ |data|", title=f"Share of the credit by layer: mean and range of {len(tables)} seeds")
    axes.legend(frameon=False, fontsize=8)
    return figure


def balance_figure(tables: dict[int, Table]) -> Figure:
    """What data and decay did through each layer, and their sum: mean over seeds."""
    found = {name: [table.grid("step", "layer", name) for table in tables.values()] for name in ("data", "decay")}
    steps, layers = found["data"][0][:2]
    values = {name: np.stack([grid[2] for grid in grids]) for name, grids in found.items()}  # [seed, step, layer]
    values["both"] = values["data"] + values["decay"]
    shown = [column for column in range(len(layers)) if values["data"][:, :, column].any()]
    figure = Figure(figsize=(9, 2.2 * -(-len(shown) // 2)), layout="constrained")
    for place, column in enumerate(shown):
        axes = figure.add_subplot(-(-len(shown) // 2), 2, place + 1)
        for name, color in (("data", "C0"), ("decay", "C3"), ("both", "black")):
            axes.plot(steps, values[name][:, :, column].mean(0), color=color, label=name)
            axes.fill_between(steps, values[name][:, :, column].min(0), values[name][:, :, column].max(0), color=color, alpha=0.15)
        axes.set(title=layers[column])
        axes.title.set_fontsize(9)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("step")
    figure.supylabel(f"nats a window: mean and range of {len(tables)} seeds")
    return figure


def cosine_figure(matrices: dict[tuple[int, str], np.ndarray], steps: Sequence[int], groups: Sequence[str]) -> Figure:
    figure = Figure(figsize=(2.2 * len(steps), 2.2 * len(groups)), layout="constrained")
    for place, (group, step) in enumerate((g, s) for g in groups for s in steps):
        axes = figure.add_subplot(len(groups), len(steps), place + 1)
        axes.imshow(matrices[step, group], cmap="PiYG", vmin=-1, vmax=1)
        axes.set(xticks=[], yticks=[], title=f"{group}, {step}")
        axes.title.set_fontsize(8)
    return figure


def progress_figure(tables: dict[int, Table]) -> Figure:
    figure = Figure(figsize=(9, 3 * len(tables)), layout="constrained")
    for place, (seed, table) in enumerate(tables.items()):
        axes = figure.add_subplot(len(tables), 1, place + 1)
        for name in ("train_loss", "val_loss", "restricted", "excluded", "excluded_difference"):
            axes.plot(table["step"], table[name], label=name)
        axes.set(yscale="log", ylabel="loss, nats", title=f"seed {seed}")
        axes.legend(frameon=False, fontsize=7)
    return figure
