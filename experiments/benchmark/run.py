"""How fast and how exact: the paper's MOD-113 run beside the published implementation, the rate of a matrix product, scaling, memory.

    python experiments/benchmark/run.py [--parts peer one whole rates scaling layers] [--peer 'COMMAND'] [--device cuda] [--small]

COMMAND runs the published implementation in an environment of its own and prints, as its last line, JSON with "s_per_step" (for 4
queries), "outputs" and "peak_mb"; it is started between ours, so that both meet the same machine. Every time is the median of --tries.
Prints tables, and writes everything to OUT/benchmark.json.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import explaind
from explaind.kernel.layout import Layout
from explaind.kernel.measures import Measures
from explaind.kernel.path import Recipe, Segment
from explaind.kernel.products import Products
from explaind.ledger.by_name import DTYPES, config_of, decompose_by_name, measure_named, selection, task_of
from explaind.record.device import placed
from explaind.replay.functional import Functional
from explaind.replay.steps import Part
from explaind.replay.surroundings import differentiable
from explaind.tasks import load
from explaind.tasks.training import make_optimizer

CONFIG = Path(__file__).parents[2] / "configs" / "mod113.toml"
SMALL = ["--task.p", "11", "--task.train_examples", "40", "--task.val_examples", "12", "--task.width", "16", "--task.mlp", "32"]
FIRST = 8
"""Steps of the run that is compared with the published implementation."""
AXES = ("steps", "examples", "measures", "width")
EVERYTHING = ("query", "output", "example", "layer")
Record = dict[str, Any]


# What a process of its own does, so that its peak memory is its own too


def decompose(path: str, asked: Record) -> Record:
    """Time, memory and rest rows of one decomposition."""
    run = explaind.open(path)
    marks: list[float] = []
    start = time.perf_counter()
    ledger = decompose_by_name(run, replace(config_of(run).decompose, **asked), lambda done, of: marks.append(time.perf_counter()))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if asked.get("device", "cpu") != "cpu":
        peak = torch.cuda.max_memory_allocated() / 2**20
    found: Record = {**asked, "steps": run.steps, "s_per_step": seconds / run.steps, "peak_mb": peak, **ledger.verify().maxima}
    # A step after the first ones, which trace the model and take it apart
    blocks = len(marks) / run.steps  # of queries; every block ticks at every step
    found["s_per_later_step"] = (marks[-1] - marks[0]) / (len(marks) - 1) * blocks if len(marks) > 1 else None
    return {**found, "recipes": ledger.checks.recipes[:, 0].tolist(), "threads": torch.get_num_threads()}


def train(path: str, steps: int) -> Record:
    """Time of a plain training step, without a recorder, of the run at `path`."""
    config = config_of(explaind.open(path))
    task, device = load(config.task.name, config.task.options), placed(config.train.device)
    torch.manual_seed(config.train.seed)
    model = task.model().to(device)
    optimizer, data = make_optimizer(config.optimizer, model), task.data("train")
    batch = [leaf.to(device) for leaf in torch.utils.data.default_collate([data[i] for i in range(len(data))])]

    def step() -> None:
        optimizer.zero_grad()
        task.losses(model, batch).mean().backward()
        optimizer.step()

    return {"train_s_per_step": _seconds(step, device, steps)}


def rates(path: str, dtype: str, device: str, queries: int, route: str) -> Record:
    """The rate of the products of all costates with all examples, beside that of a plain matrix product of the same shape."""
    run, target, kind = explaind.open(path), placed(device), DTYPES[dtype]
    task, layout = task_of(run), Layout(run.manifest.layers)
    theta = torch.from_numpy(run.states(0, 1)[0]).to(target, kind)
    data = task.data("train")
    batch = tuple(leaf.to(target) for leaf in torch.utils.data.default_collate([data[i] for i in range(len(data))]))
    losses = Functional(task.model(), task.losses, target, kind)
    part = Part(batch, np.arange(len(data)), torch.full((len(data),), 1 / len(data), dtype=kind, device=target))
    outputs = len(measure_named(task, "logits")[1](task.model(), [leaf[:1] for leaf in batch])[0])
    rows = queries * outputs
    a = torch.randn(rows, layout.params, dtype=kind, device=target)
    some = max(1, min(len(data), (256 << 20) // (layout.params * a.element_size())))
    gradients, into = torch.randn(some, layout.params, dtype=kind, device=target), a.new_empty(rows, some)
    with differentiable():
        products = Products(losses, layout, "layer", route)

        def work() -> None:
            for _ in products(theta, part, a):
                pass

        # in turn, so that both meet the same machine
        pairs = [(_seconds(work, target, 1), _seconds(lambda: torch.mm(a, gradients.T, out=into), target, 1)) for _ in range(5)]
    operations = 2 * rows * layout.params
    shares = [(len(data) / products_s) / (some / plain_s) for products_s, plain_s in pairs]
    return {
        "route": route,
        "dtype": dtype,
        "rows": rows,
        "matmul_gflops": operations * some / median(p for _, p in pairs) / 1e9,
        "products_gflops": operations * len(data) / median(p for p, _ in pairs) / 1e9,
        "share": median(shares),
    }


def layers(path: str, steps: Sequence[int], recipes: Sequence[str], reference: int, queries: int) -> Record:
    """Error of every recipe's contributions by layer against a quadrature with very many nodes, in float64, over their size."""
    run = explaind.open(path)
    task, layout, kind = task_of(run), Layout(run.manifest.layers), torch.float64
    asking = Functional(task.model(), measure_named(task, "log_probabilities")[1], placed("cpu"), kind)
    batch = selection(task, f"val:0:{queries}").batch(task)
    found: Record = {recipe: [] for recipe in recipes}
    for step in steps:
        theta, after = torch.from_numpy(run.states(step, step + 2)).to(kind)
        with differentiable():
            measures = Measures(asking, batch, layout, frozenset({"query", "output"}), theta)
            change = measures.values(after) - measures.values(theta)
            segment = Segment(theta, after, change, change.abs(), step)

            def by_layer(recipe: Recipe, measures: Measures = measures, segment: Segment = segment) -> np.ndarray:
                mean = segment.theta.new_zeros(measures.count, layout.params)
                measures.add_gradients(mean, recipe.points(measures, segment), secant=recipe.kind == "secant")
                return layout.dots(mean, segment.delta).view(len(layout.names), queries, -1).numpy()  # [layer, query, output]

            exact = by_layer(Recipe("gauss", reference))
            size = np.abs(exact).sum(0).mean(-1)  # [query]
            for recipe in recipes:
                word, count = recipe.split(":")
                off = np.abs(by_layer(Recipe(word, int(count))) - exact).sum(0).mean(-1) / size  # type: ignore[arg-type]
                found[recipe].append(off.tolist())
    return {"steps": list(steps), "errors": found, "median": {recipe: float(np.median(v)) for recipe, v in found.items()}}


WORKERS: dict[str, Callable[..., Record]] = {f.__name__: f for f in (decompose, train, rates, layers)}


def _seconds(work: Callable[[], object], device: torch.device, times: int) -> float:
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / times


# The parts


class Bench:
    """Starts the workers, keeps what they found, prints tables."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.found = given, {}
        self.small = SMALL if given.small else []
        self.size = 16 if given.small else 64
        given.out.mkdir(parents=True, exist_ok=True)

    def recorded(self, name: str, steps: int, *overrides: str) -> str:
        """The path of a run with so many steps, recorded unless it is there."""
        path = self.given.out / name
        command = [sys.executable, "-m", "explaind.cli", "record", str(CONFIG), "--out", str(path), "--overwrite"]
        if not (path / "commit.json").exists() or explaind.open(path).steps != steps:
            device = ["--train.device", self.given.device]
            subprocess.run([*command, "--train.steps", str(steps), *device, *self.small, *overrides], check=True, stdout=subprocess.DEVNULL)
        return str(path)

    def worker(self, name: str, *arguments: Any) -> Record:
        """What a worker found."""
        return last_json([sys.executable, __file__, "--worker", name, json.dumps(arguments)])

    def decomposed(self, path: str, **asked: Any) -> Record:
        return self.worker("decompose", path, {"device": self.given.device, "dtype": "float32", **asked})

    def medians(self, *work: Callable[[], Record]) -> list[Record]:
        """Each piece of work in turn, --tries times: what it found, with the median of every number."""
        tries = [[one() for one in work] for _ in range(self.given.tries)]
        return [_median([row[i] for row in tries]) for i in range(len(work))]

    def peer(self) -> None:
        """4 queries × all outputs × all examples × all tensors, beside the published implementation."""
        path = self.recorded("first", FIRST)
        rules = [("secant", "float32"), ("secant:4", "float32"), ("midpoint:100", "float32"), ("auto", "float32"), ("secant", "float64")]
        work = [lambda r=r, d=d: self.decomposed(path, rule=r, dtype=d, tol=1e-2, keep=EVERYTHING) for r, d in rules]  # type: ignore[misc]
        if self.given.peer:
            work.append(lambda: last_json(["sh", "-c", self.given.peer]))
        rows = self.medians(*work)
        theirs = rows.pop() if self.given.peer else None
        self.found["peer"] = {"theirs": theirs, "ours": rows}
        for row in rows:
            line = (
                f"{row['rule']:>13} {row['dtype']}  path {row['path_share']:.1e}, arithmetic {row['arithmetic_share']:.1e} of the movement"
            )
            if theirs:
                faster, less = theirs["s_per_step"] / row["s_per_step"], theirs["peak_mb"] / row["peak_mb"]
                line += f"; {faster:.1f} times faster, {less:.1f} times less memory"
            print(f"{line} ({self._time(row['s_per_step'])} a step, {row['peak_mb']:.0f} MB)", flush=True)

    def one(self) -> None:
        """64 queries, the target log-probability alone; per query, beside the published implementation's time per query."""
        path = self.recorded("first", FIRST)
        queries = 8 if self.given.small else 64
        asked = {"queries": f"val:0:{queries}", "measure": "target_log_probability", "keep": ("query", "example", "layer")}
        (ours,) = self.medians(lambda: self.decomposed(path, rule="secant", **asked))
        self.found["one"] = ours
        theirs = self.found.get("peer", {}).get("theirs")
        line = f"{queries} queries, one output: {self._time(ours['s_per_step'] / queries)} a query and step"
        if theirs:
            line += f", {theirs['s_per_step'] / 4 / (ours['s_per_step'] / queries):.0f} times faster"
        print(line, f"(path {ours['path_share']:.1e} of the movement)", flush=True)

    def whole(self) -> None:
        """The mean validation loss over a whole training, by example × layer × window, beside the training's own time."""
        steps = self.given.steps or (20 if self.given.small else 2000)
        path = self.recorded("whole", steps)
        asked = {"queries": "val", "measure": "mean_loss", "keep": ("example", "layer", "step"), "windows": max(1, steps // 40)}
        plain = min(steps, 100)
        rules = ("secant", "auto")
        work = [lambda: self.worker("train", path, plain)]
        work += [lambda r=r: self.decomposed(path, rule=r, tol=1e-2, **asked) for r in rules]  # type: ignore[misc]
        training, *rows = self.medians(*work)
        self.found["whole"] = {"training": training, "ours": rows, "steps": steps}
        for row in rows:
            ratio = row["s_per_step"] / training["train_s_per_step"]
            print(
                f"mean validation loss over {steps} steps, {row['rule']}: {ratio:.2f} times the training (path {row['path_share']:.1e})",
                flush=True,
            )

    def rates(self) -> None:
        """Products of example gradients with costates, over the rate of torch.matmul."""
        path = self.recorded("first", FIRST)
        self.found["rates"] = []
        for dtype in ("float32", "float64"):
            for route in ("materialise", "auto"):
                row = self.worker("rates", path, dtype, self.given.device, 4, route)
                self.found["rates"].append(row)
                print(f"{route:>12} {dtype}  {row['share']:.0%} of torch.matmul's rate, {row['rows']} rows", flush=True)

    def scaling(self) -> None:
        """How time and memory grow: the slope of log time over log size, of steps after the first ones, and the peak at each end."""
        base = 4 if self.given.small else 10
        # With many measures products are nearly all of the work, and what a step takes whatever the examples are is little of it.
        examples, queries, many = (10, 1, "val:0:2") if self.given.small else (1500, 2, "val:0:4")
        ordered = () if self.given.small else ("--task.pairs", "ordered", "--task.val_examples", "8")  # of which there are more
        axes: dict[str, list[tuple[int, Callable[[], Record]]]] = {axis: [] for axis in AXES}
        for k in (1, 2, 4, 8):
            steps = self.recorded(f"steps-{k * base}", k * base)
            axes["steps"].append((k * base, lambda p=steps: self.decomposed(p, rule="secant", queries="val:0:1", keep=EVERYTHING)))
            fewer = self.recorded(
                f"examples-{k * examples}", base, "--task.train_examples", str(k * examples // (2 if self.given.small else 1)), *ordered
            )
            axes["examples"].append((k * examples, lambda p=fewer: self.decomposed(p, rule="secant", queries=many, keep=EVERYTHING)))
            asked = f"val:0:{k * queries}"
            axes["measures"].append(
                (
                    k * queries,
                    lambda q=asked: self.decomposed(str(self.given.out / f"steps-{base}"), rule="secant", queries=q, keep=EVERYTHING),
                )
            )
            wider = self.recorded(f"width-{k * self.size // 2}", base, "--task.width", str(k * self.size // 2))
            axes["width"].append(
                (k * self.size // 2, lambda p=wider: self.decomposed(p, rule="secant", queries="val:0:1", keep=EVERYTHING))
            )
        self.found["scaling"] = {}
        for axis in self.given.axes:
            points = axes[axis]
            rows = self.medians(*(work for _, work in points))
            times = [row["s_per_later_step"] * (n if axis == "steps" else 1) for (n, _), row in zip(points, rows, strict=True)]
            sizes = [n for n, _ in points]
            slope = float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
            at_end = float(np.log(times[-1] / times[-2]) / np.log(sizes[-1] / sizes[-2]))
            memory = [row["peak_mb"] for row in rows]
            self.found["scaling"][axis] = {"sizes": sizes, "seconds": times, "slope": slope, "slope_at_end": at_end, "peak_mb": memory}
            print(
                f"{axis:>9} {sizes}: time grows with slope {slope:.2f}, {at_end:.2f} between the largest two; "
                f"peak memory {memory[0]:.0f} to {memory[-1]:.0f} MB",
                flush=True,
            )

    def layers(self) -> None:
        """Error of the split between layers, against a quadrature of very many nodes."""
        steps, reference = ((1, 3), 60) if self.given.small else ((5, 100, 500), 2000)
        path = self.recorded("layers", steps[-1] + 2)
        recipes = ["secant:1", "secant:2", "secant:4", "secant:8", "midpoint:100", "gauss:8"]
        row = self.worker("layers", path, steps, recipes, reference, 2 if self.given.small else 8)
        self.found["layers"] = row
        for recipe, error in row["median"].items():
            print(f"{recipe:>13}: contributions by layer off by {error:.1e} of their size (median over steps and queries)", flush=True)

    def _time(self, seconds: float) -> str:
        return f"{seconds:.3g} s"

    def write(self) -> Path:
        """Everything that was found, and where."""
        device = torch.cuda.get_device_name() if self.given.device != "cpu" else f"{platform.machine()}, {torch.get_num_threads()} threads"
        about = {"device": device, "torch": torch.__version__, "python": platform.python_version(), "tries": self.given.tries}
        path: Path = self.given.out / "benchmark.json"
        older = json.loads(path.read_text())["parts"] if path.exists() else {}
        path.write_text(json.dumps({"about": about, "parts": {**older, **self.found}}, indent=1))
        return path


PARTS = ("peer", "one", "whole", "rates", "scaling", "layers")


def _median(rows: Sequence[Record]) -> Record:
    """The median of every number that all have."""
    numbers = {k for k, v in rows[0].items() if isinstance(v, float)}
    return {k: median(row[k] for row in rows) if k in numbers else v for k, v in rows[0].items()}


def last_json(command: list[str]) -> Record:
    """What a program of its own prints last."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: Record = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--axes", nargs="+", default=AXES, choices=AXES, help="of the part scaling")
    parser.add_argument("--peer")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of the whole training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a small prime, for a try")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    given = options().parse_args()
    if given.worker:
        name, arguments = given.worker
        print(json.dumps(WORKERS[name](*json.loads(arguments))))
        return
    bench = Bench(given)
    for part in given.parts:
        getattr(bench, part)()
    print(bench.write())


if __name__ == "__main__":
    main()
