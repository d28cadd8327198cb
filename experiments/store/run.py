"""Is a recording, or a decomposition, that is killed ever corrupt, and what is lost?

python experiments/store/run.py [--what record|decompose] [--kills 50] [--small] [--out runs/store]

A training is recorded in a process of its own and killed with SIGKILL at a random moment, one in five while the run is being made. Its
record is checked, and what `info` and `repair` say of it; it is resumed from the training's own checkpoint, run to the end, and compared
bitwise with one that was not interrupted. Or a decomposition of some of its steps is killed, one in four while its ledger is being saved,
looked at, asked for again, and its ledger compared bitwise with the undisturbed one. A child that was through before it was killed does not
count: another takes its place. Exit status 1: there was a fault.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import explaind
from explaind.cli import main as main_of_cli
from explaind.ledger import parts
from explaind.record import recorder as recording
from explaind.store.repair import repair

MEMORY = 1_000_000
"""Bytes, for three queries at a time."""


@dataclass(frozen=True)
class Size:
    """Steps of a recording and the seconds within which it is killed; steps and queries of a decomposition."""

    recorded: int = 400
    seconds: float = 1.5
    steps: int = 48
    queries: int = 12

    def options(self) -> list[str]:
        return ["--small"] if self == SMALL else []


SMALL = Size(160, 0.6, 32, 6)


def data():
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(64, 20, generator=g), torch.randint(4, (64,), generator=g))


class Loop:
    """A small training whose batches depend on the step alone, with a checkpoint every seven steps."""

    def __init__(self, path: Path, size: Size) -> None:
        torch.manual_seed(0)
        self.steps, self.path, self.file, self.data = size.recorded, path, path.with_suffix(".pt"), data()
        self.model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def load(self) -> None:
        if self.file.exists():
            model, optimizer = torch.load(self.file, weights_only=True)
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict(optimizer)

    def run(self, tell: bool = False, anew: bool = False) -> None:
        """To its end; anew: what a recording left that had not begun is overwritten."""
        if tell:
            print(0, flush=True)
        how = {"overwrite": True} if anew else {"resume": True}
        with explaind.record(self.optimizer, self.model, self.path, data=self.data, **how) as recorder:
            while recorder.steps < self.steps:
                ids = (torch.arange(16) + 5 * recorder.steps) % len(self.data)
                recorder.examples(ids)
                self.optimizer.zero_grad()
                x, y = self.data[ids]
                F.cross_entropy(self.model(x), y).backward()
                self.optimizer.step()
                if tell:
                    print(recorder.steps, flush=True)
                if recorder.steps % 7 == 0:
                    torch.save((self.model.state_dict(), self.optimizer.state_dict()), self.file.with_suffix(".new"))
                    self.file.with_suffix(".new").replace(self.file)


CREATION = 0.03
"""Seconds within which a run is made."""


def kill_one(size: Size, path: Path, rng: random.Random, creating: bool) -> int | None:
    """Steps that the child had told of when it was killed; None: it was through. creating: just after it was about to begin."""
    told, delay = path.with_suffix(".told"), rng.uniform(0.0, CREATION if creating else size.seconds)
    with told.open("w") as out:
        child = subprocess.Popen([sys.executable, __file__, "--child", str(path), *size.options()], stdout=out)
        while not told.stat().st_size and child.poll() is None:
            time.sleep(0.001)
        time.sleep(delay)
        killed = killed_now(child)
    return max(map(int, told.read_text().splitlines()), default=0) if killed else None


def killed_now(child: subprocess.Popen[bytes]) -> bool:
    """Whether that is what it died of, and not through already. RuntimeError where it failed by itself."""
    child.send_signal(signal.SIGKILL)
    code = child.wait()
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the child failed with {code} before it was killed")
    return code != 0


def decomposed(size: Size, run: Path, save: Path | None, progress: Callable[[int, int], None] | None = None) -> explaind.Ledger:
    """Of some steps of a recording, in blocks of three queries."""
    some, queries = explaind.open(run).first(size.steps), torch.randn(size.queries, 20, generator=torch.Generator().manual_seed(2))
    return explaind.decompose(
        some,
        Loop(run, size).model,
        data=data(),
        losses=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        queries=queries,
        measure=lambda model, x: model(x),
        keep=("query", "output", "example", "layer"),
        memory=MEMORY,
        save=save,
        progress=progress,
    )


def decompose_child(size: Size, run: Path, save: Path) -> None:
    """Tells of every step that it has swept."""
    print(0, flush=True)
    decomposed(size, run, save, lambda done, total: print(done, flush=True))


SAVING = 0.1
"""Seconds within which a ledger is saved, behind the last step."""


def kill_decompose(size: Size, run: Path, save: Path, rng: random.Random, after: int, within: float) -> int | None:
    """Steps that were swept when the child was killed, so many of them told and within so many seconds; None: it was through."""
    told = save.with_suffix(".told")
    with told.open("w") as out:
        child = subprocess.Popen([sys.executable, __file__, "--child", str(run), "--save", str(save), *size.options()], stdout=out)
        while len(told.read_text().splitlines()) <= after and child.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, within))
        killed = killed_now(child)
    return max(0, len(told.read_text().splitlines()) - 1) if killed else None


def alike(one: explaind.Ledger, other: explaind.Ledger) -> bool:
    """Bitwise, with all coordinates and checks."""
    arrays = [{**{name: ledger[name] for name in (*ledger.rows, "final")}, **ledger.coords} for ledger in (one, other)]
    checks = [{name: values for name, values in vars(ledger.checks).items() if isinstance(values, np.ndarray)} for ledger in (one, other)]
    same = all(mine.keys() == theirs.keys() for mine, theirs in (arrays, checks))
    return same and all(mine[name].tobytes() == theirs[name].tobytes() for mine, theirs in (arrays, checks) for name in mine)


def decompositions(out: Path, kills: int, size: Size) -> dict[str, Any]:
    """Each is killed once, looked at, and asked for again."""
    Loop(out / "whole", size).run()
    rng, ticks = random.Random(1), list[int]()
    want = decomposed(size, out / "whole", None, lambda done, total: ticks.append(total))
    found: dict[str, Any] = {
        "kills": kills,
        "through": 0,
        "at": [],
        "of": ticks[-1],
        "corrupt": 0,
        "kept_work": 0,
        "finished": 0,
        "bitwise": 0,
    }
    while len(found["at"]) < kills:
        index = len(found["at"])
        save, parts_of = out / f"ledger-{index}", out / f".ledger-{index}.parts"
        moment = (rng.randint(0, ticks[-1]), 0.02) if index % 4 else (ticks[-1], SAVING)
        at = kill_decompose(size, out / "whole", save, rng, *moment)
        if at is None:
            found["through"] += 1
            shutil.rmtree(save)
            continue
        found["at"].append(at)
        whole = (save / "commit.json").exists()
        found["finished"] += whole
        found["corrupt"] += (whole and not alike(explaind.open_ledger(save), want)) or (save.exists() and not whole)
        found["kept_work"] += any(parts_of.glob("block-*"))
        ledger = explaind.open_ledger(save) if whole else decomposed(size, out / "whole", save)
        found["bitwise"] += alike(ledger, want) and alike(explaind.open_ledger(save), want)
        found["corrupt"] += bool(list(out.glob(f".{save.name}.*"))) and not whole  # nothing is left beside it
        shutil.rmtree(save)
    return found


def recordings(out: Path, kills: int, size: Size) -> dict[str, Any]:
    """Each is killed once, checked, and run to its end."""
    Loop(out / "whole", size).run()
    want, rng = explaind.open(out / "whole").states(0, size.recorded + 1), random.Random(0)
    found: dict[str, Any] = dict.fromkeys(("through", "unbegun", "corrupt", "phantom", "misstated", "resumed_bitwise"), 0)
    found |= {"kills": kills, "lost": [], "at": []}

    def sound(run: explaind.Run, steps: int) -> bool:
        return run.steps == steps and not run.damage() and np.array_equal(run.states(0, steps + 1), want[: steps + 1])

    while len(found["at"]) < kills:
        path = out / f"run-{len(found['at'])}"
        told = kill_one(size, path, rng, creating=len(found["at"]) % 5 == 0)
        if told is None:
            found["through"] += 1
            shutil.rmtree(path)
            path.with_suffix(".pt").unlink()
            continue
        found["at"].append(told)
        begun = (path / "commit.json").exists()
        held = 0
        if begun:
            run = explaind.open(path)
            held = run.steps + run.logged
            found["corrupt"] += not sound(run, run.steps)
            found["misstated"] += said(run, path.with_suffix(".copy")) != (run.steps, run.logged, held)
            found["corrupt"] += not sound(explaind.open(path.with_suffix(".copy")), held)
            shutil.rmtree(path.with_suffix(".copy"))
        else:
            found["unbegun"] += 1
        found["phantom"] += held > told + 1  # a step may be written before it is told of
        found["lost"].append(max(0, told - held))
        loop = Loop(path, size)
        loop.load()
        loop.run(anew=not begun and path.exists())
        found["resumed_bitwise"] += sound(explaind.open(path), size.recorded)
        shutil.rmtree(path)
    return found


def said(run: explaind.Run, copy: Path) -> tuple[int, int, int]:
    """Sound steps and those of the log, as `info` tells them, and the steps of a copy that `repair` has put right."""
    with redirect_stdout(StringIO()) as told:
        main_of_cli(["info", str(run.path), "--json"])
    facts = json.loads(told.getvalue())
    shutil.copytree(run.path, copy)
    return facts["sound"], facts["logged"], repair(copy).after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("record", "decompose"), default="record")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--small", action="store_true", help="fewer steps and queries, for a try")
    parser.add_argument("--out", type=Path, default=Path("runs/store"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    recording.TOGETHER = 1  # a commit every sixteen steps, of which there are many while a child lives
    parts.SECONDS = parts.PATIENCE = 0.0  # and a block on its way is saved between any two segments
    size = SMALL if given.small else Size()
    if given.child:
        return decompose_child(size, given.child, given.save) if given.save else Loop(given.child, size).run(tell=True)
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    found = (recordings if given.what == "record" else decompositions)(given.out, given.kills, size)
    (given.out / "results.json").write_text(json.dumps(found, indent=1))
    print(f"{given.kills} kills at steps {min(found['at'])} … {max(found['at'])}, {found['through']} children through before:", end=" ")
    if given.what == "record":
        print(f"{found['unbegun']} before there was a run, {found['corrupt']} corrupt, {found['phantom']} with phantom steps,")
        print(f"{found['misstated']} of which info or repair say something else, at most {max(found['lost'])} told steps lost,", end=" ")
        print(f"{found['resumed_bitwise']} resumed or made anew to a bitwise equal end")
        faults = found["corrupt"] + found["phantom"] + found["misstated"] + max(found["lost"]) + given.kills - found["resumed_bitwise"]
    else:
        print(f"of {found['of']} steps swept, {found['corrupt']} corrupt, {found['kept_work']} left work that was gone on with,")
        print(f"{found['finished']} had their ledger; {found['bitwise']} ledgers bitwise the undisturbed one")
        faults = found["corrupt"] + given.kills - found["bitwise"]
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    main()
