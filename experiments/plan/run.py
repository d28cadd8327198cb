"""Does what `explaind plan` says beforehand happen? Disk, time and memory of every way to record, and of decomposing what was recorded.

python experiments/plan/run.py [--out runs/plan] [--only NAME] [--small] [--busy]

--busy takes the time of the processor for that of the clock on both sides, which others on the machine do not change.
The plan, every recording and every decomposition are made in processes of their own, so that peak memory is each one's own.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from explaind.cli import main as explaind
from explaind.ledger.trial import peak
from explaind.store.location import size_of
from explaind.store.reader import open_run

CONFIGS = Path(__file__).parents[2] / "configs"
TRAININGS = {
    "digits": ("digits", ["--decompose.queries", "val:0:16"]),
    "quickstart": ("quickstart", ["--decompose.queries", "val:0:8"]),
    "MOD-113": ("mod113", ["--train.steps", "1000", "--decompose.queries", "val:0:1", "--decompose.measure", "target_log_probability"]),
}
SMALL = {"digits": ("digits", ["--train.steps", "40", "--task.hidden", "8", "--decompose.queries", "val:0:2"])}
HEAD = (
    "| training | state every | codec | gradients | disk | record | memory of it | ledger | decompose | memory of it "
    "| bytes of theta + moments, of all |"
)
WHAT = ("disk", "record_seconds", "record_memory", "ledger", "decompose_seconds", "decompose_memory")


def timed(words: list[str]) -> dict[str, float]:
    """A verb of the command line in this process: its seconds, and the bytes of the process at its largest."""
    begin = time.perf_counter()
    if explaind(words) not in (0, 1):
        raise SystemExit(f"explaind {' '.join(words)} failed")
    return {"seconds": time.perf_counter() - begin, "memory": peak()}


def apart(words: list[str], busy: bool) -> tuple[str, dict[str, float]]:
    """The same in a process of its own; with what it printed."""
    command = [sys.executable, __file__, "--child", *(["--busy"] if busy else []), *words]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.rstrip()
    facts, _, found = printed.rpartition("\n")
    return facts, json.loads(found)


def happened(config: str, overrides: list[str], way: dict[str, Any], run: Path, busy: bool) -> dict[str, float]:
    """What one way to record took, and what it takes to decompose."""
    shutil.rmtree(run, ignore_errors=True)
    codec = [] if way["codec"] == "any" else ["--train.codec", way["codec"]]
    gradients = ["--train.gradients", "store" if way["gradients"] else "recompute"]
    _, record = apart(["record", config, *overrides, "--train.thin", str(way["thin"]), *codec, *gradients, "--out", str(run)], busy)
    recorded = open_run(run)
    disk, numbers = size_of(run), recorded.steps * recorded.manifest.params
    each = {f"bytes of {name}": size_of(run / name) / numbers for name in ("theta", "preconditioner")}
    _, decompose = apart(["decompose", str(run), "--name", "plan"], busy)
    return {
        "disk": disk,
        "record_seconds": record["seconds"],
        "record_memory": record["memory"],
        "ledger": size_of(run / "ledgers"),
        "decompose_seconds": decompose["seconds"],
        "decompose_memory": decompose["memory"],
        "bytes": disk / numbers,
        **each,
    }


def study(name: str, trainings: dict[str, tuple[str, list[str]]], out: Path, busy: bool) -> list[dict[str, Any]]:
    """Said beside done, by way of recording."""
    file, overrides = trainings[name]
    config = str(CONFIGS / f"{file}.toml")
    said, _ = apart(["plan", config, *overrides, "--json"], busy)
    rows = []
    for way in json.loads(said)["choices"]:
        if way["refused"]:
            print(f"{name}, gradients stored: {way['refused']}" if way["gradients"] else f"{name}, thin: {way['refused']}")
            continue
        found = happened(config, overrides, way, out / name, busy)
        ratios = {what: way[what] / found[what] for what in WHAT}
        rows.append({"training": name, "said": way, "done": found, "ratio": ratios})
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table in the README."""
    way, done, ratio = row["said"], row["done"], row["ratio"]

    def mib(what: str) -> str:
        return f"{done[what] / 2**20:.2f} MiB ({ratio[what]:.2f})"

    def seconds(what: str) -> str:
        return f"{done[what]:.1f} s ({ratio[what]:.2f})"

    first = f"| {row['training']} | {way['thin'] or 'every step'} | {way['codec']} | {way['gradients'] or '–'} | {mib('disk')} "
    second = f"| {seconds('record_seconds')} | {mib('record_memory')} | {mib('ledger')} "
    third = f"| {seconds('decompose_seconds')} | {mib('decompose_memory')} "
    return first + second + third + f"| {done['bytes of theta']:.2f} + {done['bytes of preconditioner']:.2f}, {done['bytes']:.2f} |"


def main() -> None:
    if "--busy" in sys.argv:
        time.perf_counter = time.process_time
    if sys.argv[1:2] == ["--child"]:
        return print(json.dumps(timed([word for word in sys.argv[2:] if word != "--busy"])))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/plan"))
    parser.add_argument("--only", choices=TRAININGS)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--busy", action="store_true", help="time of the processor, for a machine with other work")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    trainings = SMALL if given.small else TRAININGS
    print(HEAD)
    print("|---" * 11 + "|")
    rows = [row for name in trainings if given.only in (None, name) for row in study(name, trainings, given.out, given.busy)]
    (given.out / "plan.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
