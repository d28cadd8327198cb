"""The first steps of the paper's MOD-113 run, decomposed for 4 queries × 115 outputs: time per step and peak memory.

    python experiments/mod113/run.py [--steps 20] [--rule midpoint:100 …] [--peer 'COMMAND']

COMMAND runs the published implementation in an environment of its own and prints, as its last line, JSON with "s_per_step" and
"peak_mb"; it is started in the same run, between ours, so that both meet the same machine.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[2] / "configs" / "mod113.toml"
DECOMPOSE = """
import json, resource, sys, time, torch, explaind
from dataclasses import replace
from explaind.ledger.by_name import config_of, decompose_by_name
path, rule, tol, dtype, device = sys.argv[1:]
run = explaind.open(path)
asked = replace(config_of(run).decompose, rule=rule, tol=float(tol), dtype=dtype, device=device)
start = time.perf_counter()
ledger = decompose_by_name(run, asked)
seconds = time.perf_counter() - start
maxima = ledger.verify().maxima
print(json.dumps({"rule": rule, "dtype": dtype, "device": device, "s_per_step": seconds / run.steps,
                  "recipes": ledger.checks.recipes[:, 0].tolist(),
                  "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "threads": torch.get_num_threads(), **maxima}))
"""


def last_json(command: list[str]) -> dict[str, Any]:
    """What a program of its own prints last, so that its peak memory is its own too."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def record(out: Path, steps: int, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "explaind.cli", "record", str(CONFIG), "--out", str(out), "--overwrite", "--train.steps", str(steps)]
    subprocess.run([*command, *overrides], check=True)


def decompose(out: Path, rule: str, tol: float, dtype: str, device: str) -> dict[str, Any]:
    return last_json([sys.executable, "-c", DECOMPOSE, str(out), rule, str(tol), dtype, device])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rules", nargs="+", default=["midpoint:100", "auto", "secant", "secant:4"])
    parser.add_argument("--tol", type=float, default=1e-2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer")
    parser.add_argument("--out", type=Path, default=Path("runs/mod113-first-steps"))
    given = parser.parse_args()
    record(given.out, given.steps, [])
    results = []
    for rule in given.rules:
        for dtype in given.dtypes:
            results.append(decompose(given.out, rule, given.tol, dtype, given.device))
            print(json.dumps(results[-1]), flush=True)
            if given.peer and len(results) == 1:
                peer = last_json(["sh", "-c", given.peer])
                print(json.dumps({"peer": peer}), flush=True)
    if given.peer:
        for ours in results:
            speed, memory = peer["s_per_step"] / ours["s_per_step"], peer["peak_mb"] / ours["peak_mb"]
            print(f"{ours['rule']} {ours['dtype']}: {speed:.1f} times faster, {memory:.1f} times less memory")
    (given.out.parent / f"{given.out.name}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
