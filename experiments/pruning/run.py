"""How much of a network can go by credit, and is that better than by magnitude, by gradient or by lot?

python experiments/pruning/run.py --source FOLDER [--seeds 0 1 2] [--parts train credit prune ablate] [--small]

Trains and records ResNet-9 on shirts and T-shirts (configs/pairs.toml), takes its predictions apart by parameter and window of steps, and
sets what has least score to zero: single parameters, neurons, tensors; nothing is retrained. Then every neuron and tensor is taken out
alone. FOLDER holds the files of Fashion-MNIST, see `make fashion`; by default it is where the Debian package installs them. All that was
made is kept in --out and not made again. Prints the tables, and writes them with results.json and figures. --small is two handwritten
digits, a try in half a minute.
"""

import argparse
import json
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from comparing import ABLATED, LEVELS, LOOKS, LOSS, at, figure, foretold, margins, markdown, overlaps, reach
from sklearn.datasets import load_digits
from torch.utils._pytree import tree_map

import explaind
from explaind.analysis.components import components
from explaind.analysis.pruning import (
    METHODS,
    ablation,
    ablation_ranks,
    baseline_scores,
    credit_scores,
    mask,
    pruned,
    pruning_curve,
    scores_of,
)
from explaind.analysis.surgery import Bench, layers_named
from explaind.analysis.table import Table, stacked
from explaind.config import read
from explaind.ledger.by_name import config_of, decompose_by_name
from explaind.tasks import load
from explaind.tasks.training import train

CONFIG = Path(__file__).parents[2] / "configs" / "pairs.toml"
SMALL = ("--task.classes", "[3, 8]", "--task.widths", "[4, 4, 8, 8]", "--train.steps", "40", "--train.batch", "48", "--train.warmup", "5")
SPARE = ("output",)
"""Stays whole, as in the paper."""
KEPT = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
EMPTY = 1e-2
"""Below this a parameter is small beside torch's initial ones, which are up to 0.04 in the widest layers and 0.3 in the first."""
TRAIN_IMAGES = 1000
"""Of the training set, on which a pruned network is measured too: the gradient's score needs all of them, an accuracy does not."""
VAL_IMAGES = 300
"""Of the held-out images, on which a network without one of its hundreds of components is measured."""
PARTS = ("train", "credit", "prune", "ablate")


class Study:
    """All of it, for some seeds."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, Path(given.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = {"seeds": given.seeds, "queries": given.queries, "rule": given.rule, "kept": KEPT}
        self.told: dict[str, str] = {}
        source = str(digits(self.out / "digits.npz")) if given.small else given.source
        self.runs = {seed: self._trained(seed, source) for seed in given.seeds}
        self.benches = {seed: Bench(run) for seed, run in self.runs.items()}

    def _trained(self, seed: int, source: str) -> explaind.Run:
        """A run, recorded unless it is there."""
        path = self.out / f"seed-{seed}"
        small, decay = SMALL if self.given.small else (), [] if self.given.decay is None else ["--optimizer.weight_decay", self.given.decay]
        config = read(CONFIG, ["--train.seed", str(seed), "--train.threads", "1", "--task.source", source, *decay, *small])
        if not (path / "commit.json").exists() or not (run := explaind.open(path)).complete or run.steps != config.train.steps:
            train(load(config.task.name, config.task.options), config, path, overwrite=True)
        return explaind.open(path)

    def _ledger(self, seed: int) -> explaind.Ledger:
        """Credit by parameter and window, decomposed unless it is there; one that was interrupted goes on."""
        run, given = self.runs[seed], self.given
        path = run.path / "ledgers" / f"params-{given.queries}-{given.rule.replace(':', '-')}"
        if not (path / "commit.json").exists():
            windows = 10 if given.small else 46  # an epoch
            asked = replace(config_of(run).decompose, queries=f"val:0:{given.queries}", rule=given.rule, windows=windows, budget=16.0)
            decompose_by_name(run, replace(asked, keep=("query", "param", "step")), save=path)
        return explaind.open_ledger(path)

    def train(self) -> None:
        """How good are the networks that will be pruned?"""
        rows = []
        for seed, run in self.runs.items():
            bench = self.benches[seed]
            theta = run.theta(run.steps)
            sizes = np.abs(np.concatenate([values.reshape(-1) for values in theta.values()]))
            rows.append({"seed": seed, **bench.measured(theta), "emptied": float((sizes < EMPTY).mean())})
        self._tell("training", f"The networks after {run.steps} steps; emptied: share of the parameters below {EMPTY:g} in size", rows)

    def credit(self) -> None:
        """The ledgers, and whether they close."""
        rows = []
        for seed in self.runs:
            verdict = self._ledger(seed).verify()
            checks = ("closure", "path_share", "arithmetic_share", "replay_error")
            row = {"seed": seed, **{name: float(verdict.maxima[name]) for name in checks}}
            rows.append(
                {
                    **row,
                    "explained": float(verdict.explained.min()),
                    "verdict": "ok" if verdict.ok else "; ".join(reason.partition(" (")[0] for reason in verdict.reasons),
                }
            )
        self._tell("checks", f"The ledgers of {self.given.queries} held-out images", rows)

    def prune(self) -> None:
        """Curves, what they show at one sparsity, and the identities that they rest on."""
        curves, common, identities = [], [], []
        for seed in self.runs:
            scores = self._scores(seed)
            curves.append(self._curve(seed, scores))
            common += [{"seed": seed, **row} for row in overlap(self.runs[seed], scores, self._free(seed))]
            identities.append({"seed": seed, **self._identities(seed, scores, curves[-1])})
            print(f"seed {seed}: pruned", flush=True)
        self.found["identities"] = identities
        table = stacked(curves, seed=list(self.runs))
        table.write(self.out / "tables")
        self.found["curves"] = {name: table[name].tolist() for name in table.columns}
        for kept in LOOKS:
            sparsity = f"{1 - kept:.0%}"
            self._tell(f"at_{sparsity[:-1]}", f"Asked for {sparsity} sparsity, nothing retrained", at(table, kept))
            self._tell(f"margins_{sparsity[:-1]}", f"Credit less a baseline at {sparsity}, seed by seed", margins(table, kept))
        within = f"The most sparsity at which, and below which, accuracy is within {LOSS:.0%} of the whole network's"
        self._tell("reach", within, reach(table))
        shared = f"Of the parameters that credit keeps at {1 - LOOKS[0]:.0%}, the share that the baseline keeps too"
        self._tell("overlap", shared, overlaps(common))
        (self.out / "figures").mkdir(exist_ok=True)
        figure(table).savefig(self.out / "figures" / "pruning.png", dpi=120)

    def ablate(self) -> None:
        """How well do the scores of a neuron or a tensor foretell what its removal costs?"""
        tables = []
        for seed, run in self.runs.items():
            scores, bench = self._scores(seed), self._narrow(seed)
            bench.batches = {split: tree_map(lambda leaf: leaf[:VAL_IMAGES], batch) for split, batch in bench.batches.items()}
            key = {"sums": _sums(scores, *METHODS), "levels": list(ABLATED), "val_images": VAL_IMAGES}
            spared = layers_named(run, bench.task, SPARE)
            tables.append(_kept(self.out / "ablations" / f"{seed}.json", key, ablation, bench, scores, ABLATED, spared))
            print(f"seed {seed}: taken apart", flush=True)
        stacked(tables, seed=list(self.runs)).write(self.out / "tables")
        ranks = stacked([ablation_ranks(table) for table in tables], seed=list(self.runs))
        self.found["ablation_ranks"] = {name: ranks[name].tolist() for name in ranks.columns}
        title = f"Components taken out alone: rank correlation of a score with what that costs on {VAL_IMAGES} held-out images"
        self._tell("ablation", title, foretold(ranks))

    def _free(self, seed: int) -> np.ndarray:
        """The parameters that may go: bool [param]."""
        run = self.runs[seed]
        spared = layers_named(run, self.benches[seed].task, SPARE)
        return np.concatenate([np.full(layer.size, layer.name not in spared) for layer in run.manifest.layers])

    def _scores(self, seed: int) -> dict[str, np.ndarray]:
        """{method: [param]}, kept in a file; baselines are of the finished network."""
        run = self.runs[seed]
        path = self.out / "scores" / f"{seed}-{self.given.queries}-{self.given.rule.replace(':', '-')}.npz"
        if not path.exists() or path.stat().st_mtime < (run.path / "commit.json").stat().st_mtime:
            path.parent.mkdir(exist_ok=True)
            theta, bench = run.theta(run.steps), self.benches[seed]
            made = {m: credit_scores(self._ledger(seed)) if m == "credit" else baseline_scores(bench, theta, m, seed) for m in METHODS}
            half = path.with_name("half.npz")  # what is interrupted leaves no file of that name
            np.savez(half, **made)
            half.replace(path)
        with np.load(path) as stored:
            return {method: stored[method] for method in METHODS}

    def _curve(self, seed: int, scores: dict[str, np.ndarray]) -> Table:
        """The curve of every method and level, each kept in a file of its own."""
        bench = self._narrow(seed)
        spared, tables = layers_named(bench.run, bench.task, SPARE), []
        for method, level in ((m, lv) for m in scores for lv in LEVELS):
            path = self.out / "curves" / f"{seed}-{method}-{level}.json"
            key = {"kept": list(KEPT), "sums": _sums(scores, method), "train_images": TRAIN_IMAGES}
            tables.append(_kept(path, key, pruning_curve, bench, {method: scores[method]}, KEPT, spared, (level,)))
        return stacked(tables)

    def _narrow(self, seed: int) -> Bench:
        """A bench with fewer training images."""
        bench = copy(self.benches[seed])
        bench.batches = {**bench.batches, "train": tree_map(lambda leaf: leaf[:TRAIN_IMAGES], bench.batches["train"])}
        return bench

    def _identities(self, seed: int, scores: dict[str, np.ndarray], curve: Table) -> dict[str, Any]:
        """What must hold whatever the scores are.

        whole     keeping all changes no bit of a parameter, at any level, by any score
        accuracy  nor of the accuracies, which are those of the network itself
        sums      how far the score of a component is from the sum of its parts' at most, relative: parameters in neurons and tensors, and
                  both of these in modules
        """
        run, bench = self.runs[seed], self._narrow(seed)
        theta, free = run.theta(run.steps), self._free(seed)
        of = {level: components(run.manifest.layers, level).of for level in (*LEVELS, "module")}
        same = []
        for values, level in ((v, lv) for v in scores.values() for lv in LEVELS):
            made = pruned(theta, mask(values, of[level], free, 1.0))
            same.append(all(made[name].tobytes() == theta[name].tobytes() for name in theta))
        nested = (("param", "neuron"), ("param", "tensor"), ("neuron", "module"), ("tensor", "module"))
        off = [_apart(values, of[child], of[parent]) for values in scores.values() for child, parent in nested]
        itself, whole = bench.measured(theta), curve.where(kept=1.0)
        accuracy = all((whole[name] == itself[name]).all() for name in itself)
        return {"whole": all(same), "accuracy": accuracy, "sums": max(off)}

    def write(self) -> Path:
        """Everything that was found, and the tables as the README has them."""
        path = self.out / "results.json"
        older = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**older, **self.found}, indent=1))
        (self.out / "tables").mkdir(exist_ok=True)
        for name, text in self.told.items():
            (self.out / "tables" / f"{name}.md").write_text(text)
        return path

    def _tell(self, name: str, title: str, rows: list[dict[str, Any]]) -> None:
        """Keep rows as they are and as the README has them, and print them."""
        self.found[name] = rows
        self.told[name] = f"{title}\n\n{markdown(rows)}\n"
        print(self.told[name], flush=True)


def _kept(path: Path, key: dict[str, Any], make: Callable[..., Table], *given: Any) -> Table:
    """A table that is made of what is given, unless a file has it under the same key."""
    if not path.exists() or json.loads(path.read_text())["key"] != key:
        path.parent.mkdir(exist_ok=True)
        made = make(*given)
        plain = {**asdict(made), "columns": {name: made[name].tolist() for name in made.columns}}
        half = path.with_name("half")  # what is interrupted leaves no file of that name
        half.write_text(json.dumps({"key": key, "table": plain}))
        half.replace(path)
    stored = json.loads(path.read_text())["table"]
    return Table(**{**stored, "columns": {name: np.array(values) for name, values in stored["columns"].items()}})


def _sums(scores: dict[str, np.ndarray], *methods: str) -> list[float]:
    """What differs for another network, or for other scores."""
    return [float(scores[name].sum()) for name in ("magnitude", *methods)]


def digits(path: Path) -> Path:
    """Handwritten digits as a source of pairs: the last third is held out."""
    images, labels = load_digits(return_X_y=True)
    pictures, cut = (images * 255 / 16).astype(np.uint8).reshape(-1, 8, 8), 1200
    if not path.exists():
        np.savez(path, x_train=pictures[:cut], y_train=labels[:cut], x_val=pictures[cut:], y_val=labels[cut:])
    return path


def overlap(run: explaind.Run, scores: dict[str, np.ndarray], free: np.ndarray) -> list[dict[str, Any]]:
    """How much of what credit keeps each baseline keeps as well; two scores that know nothing of each other share what is kept."""
    rows = []
    for level in LEVELS:
        of = components(run.manifest.layers, level).of
        kept = {method: mask(values, of, free, LOOKS[0]) & free for method, values in scores.items()}
        rows.append({"level": level, **{m: float((kept["credit"] & kept[m]).sum() / kept["credit"].sum()) for m in METHODS[1:]}})
    return rows


def _apart(values: np.ndarray, child: np.ndarray, parent: np.ndarray) -> float:
    belongs = np.zeros(child.max() + 1, dtype=np.int64)
    belongs[child] = parent
    direct = scores_of(values, parent)
    return float((np.abs(scores_of(scores_of(values, child), belongs) - direct) / np.maximum(direct, np.finfo(float).tiny)).max())


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="fashion", help="folder of the four files, or an .npz of images of one's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--queries", type=int, help="held-out images whose predictions give the credit")
    parser.add_argument("--decay", help="another weight decay than the configuration's; give another --out with it")
    parser.add_argument("--rule", default="secant", help="of the path between two steps, as in configurations")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--small", action="store_true", help="handwritten digits and few steps, for a try")
    parser.add_argument("--out", default="runs/pruning")
    return parser


def filled(given: argparse.Namespace) -> argparse.Namespace:
    """With the sizes that --small means."""
    given.queries = given.queries or (8 if given.small else 64)
    return given


def main() -> None:
    study = Study(filled(options().parse_args()))
    for part in study.given.parts:
        getattr(study, part)()
        print(study.write(), flush=True)


if __name__ == "__main__":
    main()
