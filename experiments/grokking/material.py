"""What the study of grokking is made from: recordings and ledgers, kept in a folder and not made again."""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from races import SMALL as RACE_SMALL

import explaind
from explaind.analysis.applied import WindowScores, window_scores
from explaind.analysis.forward import sampled_ledger
from explaind.config import Decompose, read
from explaind.ledger.by_name import arguments, config_of, decompose_by_name
from explaind.ledger.saving import save
from explaind.tasks import load
from explaind.tasks.modular import ModularArithmetic
from explaind.tasks.training import train

CONFIG = Path(__file__).parents[2] / "configs" / "mod113.toml"
SMALL = ("--task.p", "13", "--task.width", "16", "--task.mlp", "32", "--task.train_examples", "60", "--task.val_examples", "25")
MOD53 = CONFIG.with_name("mod53.toml")
NAMED = ("data", "losses", "queries", "measure", "rule", "tol", "dtype", "device")
"""What ``decompose`` and the analyses that need no sweep take alike."""


class Material:
    """Of some seeds."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, Path(given.out)
        self.window = 5 if given.small else 50

    @cached_property
    def runs(self) -> dict[int, explaind.Run]:
        """The paper's network, recorded, by seed."""
        return {seed: self.trained(f"seed-{seed}", seed) for seed in self.given.seeds}

    @cached_property
    def task(self) -> ModularArithmetic:
        """The same for every seed, which draws the model alone."""
        config = config_of(next(iter(self.runs.values())))
        task = load(config.task.name, config.task.options)
        assert isinstance(task, ModularArithmetic)
        return task

    @cached_property
    def plain(self) -> Decompose:
        """What every decomposition of the study asks."""
        queries, measure = f"val:0:{self.given.queries}", "target_log_probability"
        return Decompose(queries=queries, measure=measure, dtype="float32", device=self.given.device, rule=self.given.rule)

    def named(self, view: str) -> str:
        """Of a ledger: one that was asked in another way is another one."""
        return f"{view}.{self.given.rule.replace(':', '-')}.{self.given.queries}.{self.given.sample}"

    def trained(self, name: str, seed: int, *overrides: str, of: Path = CONFIG) -> explaind.Run:
        """A run, recorded unless it is there."""
        path, steps = self.out / name, self.given.steps if of == CONFIG else self.given.short
        if (path / "commit.json").exists() and (run := explaind.open(path)).complete and run.steps == steps:
            return run
        small = () if not self.given.small else SMALL if of == CONFIG else RACE_SMALL
        config = read(of, ["--train.seed", str(seed), *small, "--train.steps", str(steps), *overrides])
        train(load(config.task.name, config.task.options), config, path, overwrite=True)
        return explaind.open(path)

    def ledger(self, run: explaind.Run, name: str, **asked: Any) -> explaind.Ledger:
        """A ledger of a run, decomposed unless it is there; one that was interrupted goes on."""
        path = run.path / "ledgers" / name
        if not (path / "commit.json").exists():
            decompose_by_name(run, replace(self.plain, windows=self.window, budget=16.0, **asked), save=path)
        return explaind.open_ledger(path)

    def sampled(self, run: explaind.Run) -> tuple[dict[str, Any], np.ndarray | None]:
        """What to ask of a ledger with layer shares, and which of its entries are single examples; None: all.

        The examples that are not in the sample are told together, in one entry after the others.
        """
        groups: dict[str, Any] = {"layer": "task"}
        asked = {"keep": ("query", "example", "layer", "step"), "groups": groups}
        if self.given.sample >= len(run.examples):
            return asked, None
        chosen = np.sort(np.random.default_rng(0).choice(run.examples, self.given.sample, replace=False))
        groups["example"] = {str(i): [int(i)] for i in chosen}
        return asked, np.arange(self.given.sample)

    def applied(self, run: explaind.Run) -> explaind.Ledger:
        """The ledger of layer shares in the applied view: forwards where a sample of the examples is told one by one."""
        asked, sample = self.sampled(run)
        path = run.path / "ledgers" / self.named("applied")
        if sample is None or (path / "commit.json").exists():
            return self.ledger(run, path.name, **asked, view="applied")
        named, begun = arguments(run, self.plain), path.with_name(f"{path.name}.begun")
        some = {name: named[name] for name in NAMED}
        examples = [ids[0] for ids in asked["groups"]["example"].values()]
        found = sampled_ledger(run, named["model"], examples, groups=self.task.layer_groups(), windows=self.window, **some)
        shutil.rmtree(begun, ignore_errors=True)
        save(found, begun)
        begun.replace(path)
        return explaind.open_ledger(path)

    def scores(self, run: explaind.Run, looks: Sequence[int]) -> WindowScores:
        """What the windows that begin at these steps did to each query, by parameter; kept, and not made again."""
        path, windows = run.path / "analysis" / "scores.npz", [(step, min(step + self.window, run.steps)) for step in looks]
        asked: dict[str, Any] = {"windows": windows, "queries": self.given.queries, "rule": self.given.rule, "run": run.identity}
        if path.exists():
            with np.load(path) as kept:
                if all(name in kept and np.array_equal(kept[name], value) for name, value in asked.items()):
                    return WindowScores(kept["starts"], kept["scores"], float(kept["missed"]))
        named = arguments(run, self.plain)
        some = {name: named[name] for name in NAMED}
        found = window_scores(run, named["model"], windows, **some)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, starts=found.starts, scores=found.scores, missed=found.missed, **asked)
        return found
