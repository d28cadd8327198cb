"""How does a network grok? The paper's study on addition mod 113, with the statistics and controls that it lacks.

python experiments/grokking/run.py [--seeds 43 44 45] [--steps 2000] [--queries 64] [--sample 64] [--rule secant:2] [--small]
                                   [--parts train credit similarity progress operations grokfast filtered]

Every training, ledger and table is kept in --out and not made again: what was interrupted goes on. Prints tables and writes results.json
and figures. --small is a small prime for a few steps, a try of the whole in less than a minute.
"""

import argparse
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import grokfast
import numpy as np
import telling
from drawing import balance_figure, cosine_figure, progress_figure, shares_figure
from material import MOD53, Material
from matplotlib.figure import Figure
from races import FILTERS, OPERATIONS, Race, races
from races import table as race_table

import explaind
from explaind.analysis import phases as of_phases
from explaind.analysis import similarity as of_similarity
from explaind.analysis.analyse import curve_table
from explaind.analysis.clock import clock_or_pizza
from explaind.analysis.credit import balance, layer_shares, sampling_error
from explaind.analysis.progress import key_frequencies, progress
from explaind.analysis.table import Table, stacked
from explaind.kernel.groups import REST, grouping
from explaind.report.figures import scatter

LOOKS = (200, 250, 500, 1100, 1900)
"""The steps at which the paper draws its cosine matrices."""
PHASES = 3
"""What the paper reports; the number that the criterion prefers is written beside it."""
PARTS = ("train", "credit", "similarity", "progress", "operations", "grokfast", "filtered")
LEDGERS = ("none", "EMA")
"""The filters whose ledgers are compared; that of a moving mean would want a costate for each of its hundred slots."""


class Study(Material):
    """All of it, for some seeds."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(given)
        self.found: dict[str, Any] = {"seeds": given.seeds, "steps": given.steps, "queries": given.queries, "sample": given.sample}

    def train(self) -> None:
        """Do they grok, and do they without decay?"""
        curves = {seed: curve_table(run, self.task) for seed, run in self.runs.items()}
        self.found["training"] = [{"seed": seed, **_milestones(table)} for seed, table in curves.items()]
        still = {
            seed: curve_table(self.trained(f"no-decay-{seed}", seed, "--optimizer.weight_decay", "0"), self.task) for seed in self.runs
        }
        self.found["no_decay"] = [{"seed": seed, "val_accuracy_most": float(t["val_accuracy"].max())} for seed, t in still.items()]
        self._table(stacked(list(curves.values()), seed=list(curves)))
        self._told("training", telling.training(self.found["training"], self.found["no_decay"]))

    def credit(self) -> None:
        """Shares of the layers, the balance of data and decay, and the phases, in the applied view."""
        sample = self.sampled(next(iter(self.runs.values())))[1]
        ledgers = {seed: self.applied(run) for seed, run in self.runs.items()}
        shares = {seed: layer_shares(ledger, sample) for seed, ledger in ledgers.items()}
        if sample is not None:
            errors = stacked([sampling_error(ledger, sample) for ledger in ledgers.values()], seed=list(ledgers))
            self._table(errors)
            self.found["sampling_error"] = {
                "root_mean_square": float(np.sqrt(np.square(errors["error"]).mean())),
                "most": float(errors["error"].max()),
            }
        self.found["checks"] = [{"seed": seed, **_checks(ledger)} for seed, ledger in ledgers.items()]
        self._table(stacked(list(shares.values()), seed=list(shares)))
        balances = {seed: balance(ledger) for seed, ledger in ledgers.items()}
        self._table(stacked(list(balances.values()), seed=list(balances)))
        preferred = {seed: of_phases.boundaries(of_phases.phases(table)).tolist() for seed, table in shares.items()}
        cut = {seed: of_phases.phases(table, PHASES) for seed, table in shares.items()}
        self._table(stacked(list(cut.values()), seed=list(cut)))
        self.found["phases"] = [
            {"seed": seed, "begin": of_phases.boundaries(cut[seed]).tolist(), "preferred": preferred[seed]} for seed in self.runs
        ]
        arrived = [_milestones(curve_table(run, self.task))["val_0.95_at"] for run in self.runs.values()]
        if len(self.runs) > 1:
            lengths = [at or run.steps for at, run in zip(arrived, self.runs.values(), strict=True)]
            agreed = of_phases.agreement(list(cut.values()), lengths)
            self._table(agreed)
            self.found["phase_agreement"] = {name: agreed[name].tolist() for name in agreed.columns}
        self._told("credit", telling.credit(shares, balances, {row["seed"]: row["begin"] for row in self.found["phases"]}))
        self._told("phases", telling.phases(self.found["phases"], arrived))
        self._figure("layer_shares", shares_figure(shares))
        self._figure("balance", balance_figure(balances))

    def similarity(self) -> None:
        """Which validation sums are learned in the same way, and whether that is periodic at the network's own frequencies."""
        names = [layer.name for layer in next(iter(self.runs.values())).manifest.layers]
        made = grouping("layer", self.task.layer_groups(), names)
        groups = {
            group: [name for name, at in zip(names, made.of, strict=True) if at == i] for i, group in enumerate(made.names) if group != REST
        }
        data = self.task.data("val")
        classes = np.array([int(data[i][1]) for i in range(self.given.queries)])
        self.found["similarity"], planes = [], dict[tuple[str, int], list[float]]()
        for seed, run in self.runs.items():
            looks = sorted({min(step, run.steps - 1) // self.window * self.window for step in self.looks})
            scores = self.scores(run, looks)
            table = of_similarity.similarity_of(scores.starts, scores.scores, np.arange(self.given.queries), run.manifest.layers, groups)
            table.write(run.path / "analysis" / "params")
            self.found.setdefault("scores_missed", {})[seed] = scores.missed
            matrices = {(step, group): _matrix(table, step, group) for group in (*groups, of_similarity.ALL) for step in looks}
            components = {at: of_similarity.kernel_pca(matrix, np.arange(self.given.queries)) for at, matrix in matrices.items()}
            for (step, group), matrix in matrices.items():
                row = {}
                if self.keys[seed]:
                    tested = of_similarity.agreement(matrix, classes, self.task.p, self.keys[seed])
                    row = {name: float(tested[name][0]) for name in ("excess", "null_sd", "p_value")}
                self.found["similarity"].append({"seed": seed, "step": step, "layer": group, "frequencies": self.keys[seed], **row})
                plane = components[step, group].where(sample=0)["variance"][:2].sum()
                planes.setdefault((group, step), []).append(float(plane))
            stacked([components[looks[-1], group] for group in groups], layer=list(groups)).write(run.path / "analysis" / "params")
            order = np.argsort(classes, kind="stable")
            ordered = {at: matrix[np.ix_(order, order)] for at, matrix in matrices.items()}
            self._figure(f"cosines-{seed}", cosine_figure(ordered, looks, list(groups)))
            points = {group: components[looks[-1], group].grid("component", "sample", "coordinate")[2][:2] for group in groups}
            self._figure(f"kernel_pca-{seed}", scatter(points, classes, f"kernel PCA of step {looks[-1]}, seed {seed}", "answer"))
            print(f"seed {seed}: key frequencies {self.keys[seed]}", flush=True)
        self._told("similarity", telling.similarity(self.found["similarity"]))
        self._told("components", telling.components(planes))

    def progress(self) -> None:
        """Restricted and excluded loss, sparsity in frequency, and the norm of the weights, along each run."""
        tables = {seed: progress(run, self.task, self.keys[seed]) for seed, run in self.runs.items()}
        whole = stacked(list(tables.values()), seed=list(tables))
        self._table(whole)
        self.found["progress"] = [{"seed": seed, **_flat(table, self.task.p)} for seed, table in tables.items()]
        keys = {seed: key_frequencies(run, self.task) for seed, run in self.runs.items()}
        self._told("progress", telling.progress(self.found["progress"], keys))
        self._figure("progress", progress_figure(tables))
        ways = {seed: clock_or_pizza(run, self.task, [run.steps]) for seed, run in self.runs.items()}
        self._table(stacked(list(ways.values()), seed=list(ways)))
        self.found["clock"] = [{"seed": seed, **{name: float(table[name][0]) for name in table.columns}} for seed, table in ways.items()]
        self._told("clock", telling.clock(self.found["clock"]))

    @property
    def looks(self) -> tuple[int, ...]:
        return (0, 10, 20, 30, 35) if self.given.small else LOOKS

    @cached_property
    def keys(self) -> dict[int, list[int]]:
        """The key frequencies of each network; in a try, which is too short for any, the one that its embedding has most of."""
        found = {}
        for seed, run in self.runs.items():
            table = key_frequencies(run, self.task)
            chosen = table["key"] if not self.given.small else table["embedding"] == table["embedding"].max()
            found[seed] = table["frequency"][chosen].tolist()
        return found

    def operations(self) -> None:
        """Do other operations than addition grok?"""
        found = {name: self._races(name) for name in OPERATIONS}
        self.found["operations"] = {name: [vars(race) for race in mine] for name, mine in found.items()}
        self._told("operations", race_table(found))

    def grokfast(self) -> None:
        """How much sooner does a network generalise behind Grokfast?"""
        found = {name: self._races("mod53", overrides) for name, overrides in FILTERS.items()}
        self.found["grokfast"] = {name: [vars(race) for race in mine] for name, mine in found.items()}
        self._told("grokfast", race_table(found))

    def filtered(self) -> None:
        """What changes in the ledger behind Grokfast, seed by seed."""
        figures = {}
        self.found["filtered_checks"] = []
        for name in LEDGERS:
            for seed, race in enumerate(self._races("mod53", FILTERS[name])[: self.given.filtered]):
                run = self.trained(f"grokfast-{name}-{seed}", seed, *FILTERS[name], of=MOD53)
                asked, sample = self.sampled(run)
                ledger = self.ledger(run, self.named("seen"), **asked)
                self.found["filtered_checks"].append({"filter": name, "seed": seed, **_checks(ledger)})
                figures[name, seed] = grokfast.of_ledger(ledger, sample, race.val_at or run.steps, PHASES)
        self.found["filtered"] = [{"filter": name, "seed": seed, **row} for (name, seed), row in figures.items()]
        self._told("filtered", grokfast.text(grokfast.told(figures)))

    def _races(self, name: str, overrides: Sequence[str] = ()) -> list[Race]:
        return races(name, range(self.given.races), self.out / "races", overrides, self.given.small)

    def write(self) -> Path:
        """Everything that was found."""
        path = self.out / "results.json"
        older = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**older, **self.found}, indent=1))
        return path

    def _table(self, table: Table) -> None:
        table.write(self.out / "tables")

    def _told(self, name: str, text: str) -> None:
        print(telling.kept(self.out / "tables", name, text), flush=True)

    def _figure(self, name: str, figure: Figure) -> None:
        (self.out / "figures").mkdir(parents=True, exist_ok=True)
        figure.savefig(self.out / "figures" / f"{name}.png", dpi=120)


def _matrix(table: Table, step: int, layer: str) -> np.ndarray:
    """Cosines [query, query] of one window and layer."""
    found: np.ndarray = table.where(step=step, layer=layer).grid("query", "other", "cosine")[2]
    return found


def _milestones(table: Table) -> dict[str, Any]:
    """Steps at which train and validation reached what, among the states that were looked at."""

    def first(split: str, accuracy: float) -> int | None:
        hits = np.flatnonzero(table[f"{split}_accuracy"] >= accuracy)
        return int(table["step"][hits[0]]) if len(hits) else None

    return {
        "train_1_at": first("train", 1.0),
        "val_0.95_at": first("val", 0.95),
        "val_1_at": first("val", 1.0),
        "final_val": float(table["val_accuracy"][-1]),
    }


def _checks(ledger: explaind.Ledger) -> dict[str, float]:
    """The worst query's, and how much of the movement of all queries the path rule missed."""
    maxima, sizes = ledger.verify().maxima, ledger.checks.by_step.sum(0)
    found = {name: float(maxima[name]) for name in ("closure", "path_share", "arithmetic_share", "replay_error")}
    return {**found, "missed": float(sizes[1] / sizes[0])}


def _flat(table: Table, p: int) -> dict[str, Any]:
    """How the losses changed while the validation loss was no better than chance: from the first state with a training loss below 0.95 of
    log p to the last one with a validation loss of at least log p."""
    chance = float(np.log(p))
    learning, guessing = np.flatnonzero(table["train_loss"] < 0.95 * chance), np.flatnonzero(table["val_loss"] >= chance)
    until = int(guessing[-1]) if len(guessing) else 0
    start = min(int(learning[0]) if len(learning) else until, until)
    losses = ("train_loss", "val_loss", "excluded", "excluded_difference", "restricted")
    found = {name: [float(table[name][i]) for i in (start, until)] for name in losses}
    return {"from": int(table["step"][start]), "until": int(table["step"][until]), **found, "chance": chance}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[43, 44, 45])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--queries", type=int)
    parser.add_argument("--sample", type=int, help="training examples of which the part credit takes sizes; the others are told together")
    parser.add_argument("--rule", default="secant:2", help="path rule of the parts credit, similarity and filtered")
    parser.add_argument("--races", type=int, help="seeds of the parts operations and grokfast")
    parser.add_argument("--filtered", type=int, help="seeds whose ledgers the part filtered compares")
    parser.add_argument("--short", type=int, help="steps of these")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a small prime, for a try")
    parser.add_argument("--out", default="runs/grokking")
    return parser


def filled(given: argparse.Namespace) -> argparse.Namespace:
    """With the sizes that --small means."""
    given.steps = given.steps or (40 if given.small else 2000)
    given.queries = given.queries or (12 if given.small else 64)
    given.sample = given.sample or (40 if given.small else 64)
    given.races = given.races or (1 if given.small else 5)
    given.filtered = given.filtered or (1 if given.small else 3)
    given.short = given.short or (20 if given.small else 1500)
    return given


def main() -> None:
    study = Study(filled(options().parse_args()))
    for part in study.given.parts:
        getattr(study, part)()
        print(study.write(), flush=True)


if __name__ == "__main__":
    main()
