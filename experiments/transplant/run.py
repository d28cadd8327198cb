"""Do grokked representations put into a fresh network make it generalise faster, and which side carries it?

python experiments/transplant/run.py [--config configs/mod53.toml] [--every 100] [--seeds 5] [--share 0/2] [--small]

Records the run that gives donors, keeps one side of it at every donor step (middle: attention and MLP; outer: embedding and decoder), draws
the rest anew, and trains on until validation accuracy is 0.95. Beside each stand the controls of explaind/analysis/transplant.py. One side
of every tenth step is also put into the finished network, and nothing trained: accuracy, divergence, confusions. Every training is kept in
--out and not done again. --share I/N does every N-th training and no more, for N processes at once; a run without it collects what all
have done, does what is missing, and writes the tables, results.json and figures.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import cells
import numpy as np
import swaps
from matplotlib.figure import Figure

import explaind
from explaind.analysis.speedup import compared, speedup
from explaind.analysis.surgery import Bench, identities, layers_named
from explaind.analysis.table import Table, stacked
from explaind.analysis.transplant import ALL_KINDS, KINDS, Patient, Training, confused, memorising, outcome, patients, swapped, transplants
from explaind.config import read
from explaind.tasks import load
from explaind.tasks.training import train

CONFIGS = Path(__file__).parents[2] / "configs"
SIDES = {"middle": ("attention in", "attention out", "linear1", "linear2"), "outer": ("embedding", "decoder")}
LAST = ("shuffled", "whole", "frozen")
SMALL = {"task.p": 11, "task.width": 16, "task.mlp": 128, "task.train_fraction": 0.2, "train.steps": 40}
SMALL |= {"optimizer.lr": 0.01, "optimizer.weight_decay": 0}  # learned by heart within these steps


class Study:
    """Donors from one run, both sides, all controls."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, Path(given.out)
        path = self.out / "donor"
        if not (path / "commit.json").exists() or not explaind.open(path).complete:
            changed = {"train.threads": 1, **(SMALL if given.small else {})}
            config = read(given.config, [part for name, value in changed.items() for part in (f"--{name}", str(value))])
            train(load(config.task.name, config.task.options), config, path, overwrite=True)
        self.run = explaind.open(path)
        self.bench = Bench(self.run)
        self.donors = list(range(given.every, self.run.steps + 1, given.every))
        self.training = Training(given.steps or self.run.steps, every=5 if given.small else 10)
        self.sides = {side: layers_named(self.run, self.bench.task, groups) for side, groups in SIDES.items() if side in given.sides}
        self.found: dict[str, Any] = {"donors": self.donors, "seeds": given.seeds, "fresh": given.fresh, "steps": self.training.steps}

    def patients(self, side: str) -> list[Patient]:
        """Every kind at every donor; with --last, controls that want a training for each donor at the last one alone.

        What has memorised is one donor, with which all others are compared.
        """
        layers, seeds, fresh, kinds = self.sides[side], range(self.given.seeds), self.given.fresh, self.given.kinds
        late = LAST if self.given.last else ()
        found = patients(self.donors, layers, seeds, fresh, [kind for kind in kinds if kind not in (*late, "memorised")])
        found += patients(self.donors[-1:], layers, seeds, fresh, [kind for kind in kinds if kind in late])
        if "memorised" in kinds:
            found += patients([self.memorised], layers, seeds, fresh, ["memorised"])
        return found

    @cached_property
    def memorised(self) -> int:
        """The donor from the memorisation phase."""
        return memorising(self.bench, self.training)

    @cached_property
    def accuracies(self) -> dict[int, tuple[float, float]]:
        """Of the run itself, on training and validation, at all donors of a swap and the host."""
        found = {step: self.bench.measured(self.run.theta(step)) for step in (*range(0, self.run.steps, swaps.EVERY), self.run.steps)}
        return {step: (one["train_accuracy"], one["val_accuracy"]) for step, one in found.items()}

    def share(self) -> None:
        """Some of the trainings, for one of several processes; those of late donors first."""
        index, of = (int(part) for part in self.given.share.split("/"))
        every = sorted((p for side in self.sides for p in self.patients(side)), key=lambda p: (p.seed, -p.donor))
        for patient in every[index::of]:
            outcome(self.bench, patient, self.training, self.out / "trainings")

    def all(self) -> None:
        """Everything, then tables, results and figures."""
        last, figures = self.run.theta(self.run.steps), self.out / "figures"
        figures.mkdir(exist_ok=True)
        for side, layers in self.sides.items():
            table = transplants(self.bench, self.patients(side), self.training, self.out / "trainings")
            summed, factors = compared(table, self.training.steps), speedup(table)
            swap = swapped(self.bench, last, list(self.accuracies), layers)
            same = identities(self.run, self.donors, layers)
            confusion = confused(self.bench, last, swaps.telling(self.accuracies), layers)
            for one in (table, summed, factors, swap, same, confusion):
                stacked([one], side=[side]).write(self.out / "tables" / side)
                self.found.setdefault(one.name, {})[side] = {column: one[column].tolist() for column in one.columns}
            _figure(side, summed, table).savefig(figures / f"{side}.png", dpi=120)
            swaps.curves(side, swap, self.accuracies).savefig(figures / f"{side}-swap.png", dpi=120)
            swaps.confusions(side, confusion).savefig(figures / f"{side}-confusion.png", dpi=120)
            _print(side, summed, factors)
            self._told(side, table, factors, swap, confusion)
        (self.out / "results.json").write_text(json.dumps(strict(self.found), indent=1, allow_nan=False))
        print(self.out / "results.json")

    def _told(self, side: str, table: Table, factors: Table, swap: Table, confusion: Table) -> None:
        """The tables of the README: printed, and kept as Markdown."""
        accuracies = {donor: self.accuracies[donor] for donor in self.donors}
        trained = cells.donors(side, table, factors, accuracies), cells.apart(side, table), cells.together(side, table, accuracies)
        text = "\n\n".join((*trained, swaps.since(side, swap), swaps.mixed(side, swap, confusion, self.accuracies)))
        (self.out / "tables" / f"{side}.md").write_text(text + "\n")
        print(text, flush=True)


def strict(found: Any) -> Any:
    """As strict JSON has it: what says nothing (NaN) is null, what never came (∞) is "inf"."""
    if isinstance(found, Mapping):
        return {key: strict(value) for key, value in found.items()}
    if isinstance(found, Sequence) and not isinstance(found, str):
        return [strict(value) for value in found]
    if isinstance(found, float) and not math.isfinite(found):
        return None if math.isnan(found) else str(found)
    return found


def _figure(side: str, summed: Table, table: Table) -> Figure:
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for place, kind in enumerate(dict.fromkeys(summed["kind"].tolist())):
        mine = summed.where(kind=kind)
        top = np.where(np.isinf(mine["most"]), np.nan, mine["most"])
        axes.plot(mine["donor"], np.where(np.isinf(mine["median"]), np.nan, mine["median"]), "o-", color=f"C{place}", label=kind, ms=3)
        axes.fill_between(mine["donor"], mine["least"], top, color=f"C{place}", alpha=0.15)
    first = table.where(kind=table["kind"][0], seed=table["seed"][0])
    axes.plot(first["donor"], first["still"], "k--", label="the run itself, from there")
    axes.set(xlabel="donor step", ylabel="steps to validation accuracy 0.95", title=f"{side} layers kept; median and range over seeds")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _print(side: str, summed: Table, factors: Table) -> None:
    print(f"{side} layers kept; steps to 0.95: median [least, most], share of seeds that got there", flush=True)
    for row in range(len(summed)):
        values = {name: summed[name][row] for name in summed.columns}
        print(
            f"  {values['kind']:>10} of step {values['donor']:>5}: {values['median']:>6.0f} [{values['least']:.0f}, {values['most']:.0f}] "
            f"{values['reached']:.0%}; {values['faster_than_random']:.2f} × random, {values['faster_than_run']:.2f} × the run itself",
            flush=True,
        )
    print(f"  times faster than …, seed by seed: median (its interval, {factors['confidence'].min():.0%})")
    for row in range(len(factors)):
        values = {name: factors[name][row] for name in factors.columns}
        interval = f"{values['low']:.2f} … {values['high']:.2f}"
        print(f"  {values['against']:>10} from step {values['donor']:>5}: {values['median']:>6.2f} ({interval})", flush=True)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIGS / "mod53.toml")
    parser.add_argument("--every", type=int, help="steps between donors")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--steps", type=int, help="of a training, at most; by default as many as the run's")
    parser.add_argument("--fresh", default="normal:0.1", help="how the other layers are drawn: normal:SCALE (the paper: 0.1) or init")
    parser.add_argument("--kinds", nargs="+", choices=ALL_KINDS, default=[*KINDS, "memorised"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="which side is kept")
    parser.add_argument("--last", action="store_true", help="controls at the last donor alone, but for random and memorised")
    parser.add_argument("--share")
    parser.add_argument("--small", action="store_true", help="a small prime and few steps, for a try")
    parser.add_argument("--out", default="runs/transplant")
    return parser


def filled(given: argparse.Namespace) -> argparse.Namespace:
    """With the sizes that --small means."""
    given.every = given.every or (20 if given.small else 100)
    given.seeds = given.seeds or (2 if given.small else 5)
    return given


def main() -> None:
    study = Study(filled(options().parse_args()))
    study.share() if study.given.share else study.all()


if __name__ == "__main__":
    main()
