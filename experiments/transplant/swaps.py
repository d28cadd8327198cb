"""One side of every tenth step put into the finished network, and nothing trained: curves, confusions and what they come to."""

from collections.abc import Mapping

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from explaind.analysis.table import Table, markdown

EVERY = 10
"""Recorded steps between donors of a swap."""
ARRIVED = 0.95
Accuracies = Mapping[int, tuple[float, float]]
"""{step: (training, validation)}, of the donors themselves; the last step is the host's."""


def telling(accuracies: Accuracies) -> list[int]:
    """Donors whose confusions tell something, none of them the host.

    Half-way to where the donor generalises; where half of what it says is right; where it has generalised; half-way from there to the host.
    """
    steps, host = sorted(accuracies), max(accuracies)
    half, aim = (next((step for step in steps if accuracies[step][1] >= least), host) for least in (0.5, ARRIVED))
    wanted = (aim / 2, half, aim, (aim + host) / 2)
    return sorted({max(step for step in steps if step <= want) for want in wanted} - {host})


def settled(swap: Table, good: np.ndarray) -> str:
    """The donor step from which on all is good; the host itself says nothing."""
    bad = np.flatnonzero(~good)
    first = bad[-1] + 1 if len(bad) else 0
    return f"{swap['donor'][first]}" if first < len(good) - 1 else "none"


def since(side: str, swap: Table) -> str:
    """From which donor on the swapped network is as good as its host."""
    accuracy, host = swap["val_accuracy"], swap["val_accuracy"][-1]
    rows = [
        [f"validation accuracy ≥ {ARRIVED}", settled(swap, accuracy >= ARRIVED)],
        [f"validation accuracy ≥ the finished network's, {host:.3f}", settled(swap, accuracy >= host)],
        *([f"KL(finished ‖ swapped) ≤ {nats} nats", settled(swap, swap["kl"] <= nats)] for nats in (1.0, 0.1, 0.01)),
    ]
    return markdown([f"{side} of a donor in the finished network, nothing trained", "from donor step … on"], rows)


def mixed(side: str, swap: Table, confusion: Table, accuracies: Accuracies) -> str:
    """What the swapped network says of validation, for the telling donors."""
    rows = []
    for donor in dict.fromkeys(confusion["donor"].tolist()):
        one, pairs = swap.where(donor=donor), confusion.where(donor=donor)
        every, wrong = pairs["count"].sum(), pairs["count"][pairs["true"] != pairs["predicted"]].sum()
        said = f"{one['train_accuracy'][0]:.2f} / {one['val_accuracy'][0]:.2f}"
        own = "{:.2f} / {:.2f}".format(*accuracies[donor])
        rows.append([donor, own, said, f"{one['kl'][0]:.3g}", f"{wrong} of {every}", len(np.unique(pairs["predicted"]))])
    head = [f"{side} of step", "donor's accuracy, training / validation", "swapped", "KL(finished ‖ swapped), nats"]
    return markdown([*head, "validation sums taken for another", "classes named"], rows)


def curves(side: str, swap: Table, accuracies: Accuracies) -> Figure:
    """Accuracy and divergence of the swapped network over donor steps."""
    figure, steps = Figure(figsize=(10, 4), layout="constrained"), swap["donor"]
    left, right = figure.subplots(1, 2)
    left.plot(steps, swap["val_accuracy"], color="C0", label="swapped, validation")
    left.plot(steps, swap["train_accuracy"], color="C1", label="swapped, training", lw=0.8)
    left.plot(steps, [accuracies[step][1] for step in steps.tolist()], "k--", label="the donor itself, validation", lw=0.8)
    left.set(xlabel="donor step", ylabel="accuracy", ylim=(-0.02, 1.02), title=f"{side} layers of the donor in the finished network")
    for column, named in (("kl", "finished ‖ swapped"), ("kl_donor", "donor ‖ swapped")):
        right.plot(steps, np.where(swap[column] > 0, swap[column], np.nan), label=named)
    right.set(xlabel="donor step", ylabel="KL on validation, nats", yscale="log", title="nothing trained")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    return figure


def confusions(side: str, confusion: Table) -> Figure:
    """A matrix a telling donor: true class down, predicted class across."""
    donors = list(dict.fromkeys(confusion["donor"].tolist()))
    figure = Figure(figsize=(3.2 * len(donors) + 0.8, 3.6), layout="constrained")
    classes, most = 1 + max(confusion["true"].max(), confusion["predicted"].max()), max(2, confusion["count"].max())
    panels = figure.subplots(1, len(donors), squeeze=False)[0]
    for axes, donor in zip(panels, donors, strict=True):
        mine, counts = confusion.where(donor=donor), np.zeros((classes, classes))
        counts[mine["true"], mine["predicted"]] = mine["count"]
        image = axes.imshow(np.ma.masked_equal(counts, 0), norm=LogNorm(1, most), interpolation="nearest")
        axes.set(title=f"{side} of step {donor}", xlabel="predicted")
    panels[0].set_ylabel("true")
    figure.colorbar(image, ax=panels, label="validation sums", shrink=0.8)
    return figure
