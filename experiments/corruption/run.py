"""Is any damage to a run on disk ever read as a number, without a word?

python experiments/corruption/run.py [--count 2000] [--seed 0] [--out runs/corruption]

Six small runs (whole, of the standard codec, with stored gradients, thin, and the first and third of these as a kill leaves them) are
damaged at random, in one way each time, opened, checked and read to the last number. An outcome is "detected" (one line of an error, or
words of the check), "harmless" (all numbers are what was recorded), or bad: a crash, a hang, too much memory, a wrong number, or a step
that is still in the log and is not shown.
"""

import argparse
import json
import random
import re
import resource
import shutil
import signal
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import explaind
from explaind.errors import ExplaindError
from explaind.record import recorder as recording
from explaind.store.tail import HEAD

STEPS, SECONDS, MEMORY = 40, 30, 128 << 20
GOOD = ("detected", "harmless")
LEAVES: tuple[Any, ...] = (0, -1, 1, 2, 2**31, 2**62, 0.5, None, True, "", "../x", "float16", "object", [], [1], [-1], {}, [2**62])


class Hang(BaseException):
    """Not an Exception: nobody may take it for a fault of the bytes that are being read."""


def record(path: Path, **options: Any) -> None:
    """A short training with a frozen layer, a buffer and dropout; path.killed is what a kill would have left."""
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    data = TensorDataset(x, x.argmax(1))
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 8), nn.Linear(8, 6))
    model[3].requires_grad_(False).register_buffer("still", torch.arange(3.0))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    with explaind.record(optimizer, model, path, data=data, **options) as recorder:
        for step in range(STEPS):
            ids = torch.randperm(32)[: 8 + step % 3]
            recorder.examples(ids)
            optimizer.zero_grad()
            inputs, targets = data[ids]
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        if not options.get("thin"):
            recorder._writer._wait()  # chunks that are on their way would be another moment of the kill in every copy
            shutil.copytree(path, path.with_name(path.name + ".killed"))


def everything(path: Path) -> tuple[list[str], dict[str, Any]]:
    """What the check says, and all that can be read."""
    run = explaind.open(path)
    words = run.damage()
    blocks = [run.block(start, min(start + 16, run.steps)) for start in range(0, run.steps, 16)]
    found: dict[str, Any] = {
        "steps": run.steps,
        "complete": run.complete,
        "logged": [{**record._asdict(), "row": asdict(record.row)} for record in run.logged_behind(run.steps).steps],
        "manifest": json.dumps(run.manifest.to_json(), sort_keys=True),
        "theta": run.stored_states(0, run.steps + 1),
        "rows": [{**asdict(row), "mode": None} for block in blocks for row in block.rows],
        "modes": [row.mode for block in blocks for row in block.rows],
        "modules": {len(row.mode) for block in blocks for row in block.rows} <= {len(run.manifest.modules)},
        "constants": dict(run.constants),
        "fingerprint": run.fingerprint,
        "examples": run.examples,
        "checksums": run.checksums(0, run.steps + 1),
        "identity": run.identity,
    }
    if run.manifest.gradients is not None:
        found["gradients"] = [run.gradients(step, 0, count) for step, count in enumerate(run.gradient_checksums()[0])]
    return words, found


def alike(one: Any, other: Any) -> bool:
    """Bitwise."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and (one.dtype, one.shape) == (other.dtype, other.shape) and one.tobytes() == other.tobytes()
    return bool(one == other)


def files(run: Path, rng: random.Random, suffix: str = "") -> list[Path]:
    found = sorted(path for path in run.rglob("*") if path.is_file() and path.name.endswith(suffix))
    rng.shuffle(found)
    return found


def bit_flip(run: Path, rng: random.Random) -> None:
    path = next(path for path in files(run, rng) if path.stat().st_size)
    text = bytearray(path.read_bytes())
    text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
    path.write_bytes(text)


def truncated(run: Path, rng: random.Random) -> None:
    path = next(path for path in files(run, rng) if path.stat().st_size)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def extended(run: Path, rng: random.Random) -> None:
    path = files(run, rng)[0]
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 100)))


def zeroed(run: Path, rng: random.Random) -> None:
    path = next(path for path in files(run, rng) if path.stat().st_size)
    text = bytearray(path.read_bytes())
    start = rng.randrange(len(text))
    text[start : start + 64] = bytes(len(text[start : start + 64]))
    path.write_bytes(text)


def deleted(run: Path, rng: random.Random) -> None:
    files(run, rng)[0].unlink()


def chunks(run: Path, rng: random.Random) -> list[Path]:
    return [path for path in files(run, rng) if "zarr.json" not in path.name and path.parent != run]


def exchanged(run: Path, rng: random.Random) -> None:
    one, other = chunks(run, rng)[:2]
    text = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(text)


def duplicated(run: Path, rng: random.Random) -> None:
    one, other = chunks(run, rng)[:2]
    other.write_bytes(one.read_bytes())


def of_another_run(run: Path, rng: random.Random) -> None:
    others = sorted(path for path in run.parent.parent.glob("sound/*") if path.name != run.name)
    path = files(run, rng)[0]
    source = rng.choice(others) / path.relative_to(run)
    if source.is_file():
        path.write_bytes(source.read_bytes())


def metadata_of_another_array(run: Path, rng: random.Random) -> None:
    one, other = files(run, rng, "zarr.json")[:2]
    one.write_bytes(other.read_bytes())


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every leaf and branch of what JSON holds."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, child in inner for place in places(child, (*at, key)))]


def inside(value: Any, at: tuple[Any, ...]) -> Any:
    """What stands at a place."""
    for key in at:
        value = value[key]
    return value


def edited(run: Path, rng: random.Random) -> None:
    path = rng.choice(files(run, rng, ".json"))
    value = json.loads(path.read_text())
    at = rng.choice([place for place in places(value) if place])
    parent = inside(value, at[:-1])
    old = parent[at[-1]]
    if rng.random() < 0.2:
        parent.pop(at[-1])
    elif isinstance(old, int) and rng.random() < 0.5:
        parent[at[-1]] = old + rng.choice((-1, 1))
    else:
        parent[at[-1]] = rng.choice(LEAVES)
    path.write_text(json.dumps(value))


KINDS: tuple[Callable[[Path, random.Random], None], ...] = (
    *(bit_flip, truncated, extended, zeroed, deleted, exchanged, duplicated, of_another_run, metadata_of_another_array),
    *(edited,) * 3,
)


@contextmanager
def bounded() -> Iterator[None]:
    """Within SECONDS and MEMORY more than there is: Hang and MemoryError where they do not suffice."""

    def hang(*_: object) -> None:
        raise Hang

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def causes(error: BaseException) -> list[BaseException]:
    """An error and all that it came of, named or not."""
    found = [error]
    for one in found:
        found += [cause for cause in (one.__cause__, one.__context__) if cause is not None and cause not in found]
    return found


def sound_records(run: Path) -> Iterator[int]:
    """Of the logs: the step of each, whatever stands before it."""
    for log in run.glob("*.log"):
        text = log.read_bytes()
        for begun in re.finditer(rb'(?s)(.{%d})\{"step": (\d+)' % HEAD.size, text):
            length, crc = HEAD.unpack(begun[1])
            if zlib.crc32(text[begun.end(1) : begun.end(1) + length]) == crc:
                yield int(begun[2])


def outcome(run: Path, want: dict[str, Any]) -> tuple[str, str]:
    """What comes of reading a damaged run, and what was said; want: what of it is to be as it was."""
    try:
        with bounded():
            words, found = everything(run)
    except Hang:
        return "HANG", ""
    except Exception as error:
        if any(isinstance(cause, MemoryError) for cause in causes(error)):
            return "MEMORY", f"{type(error).__name__}: {error}"
        told = str(error)
        return (
            ("detected", told)
            if isinstance(error, ExplaindError) and len(told.splitlines()) == 1
            else ("CRASH", f"{type(error).__name__}: {told}")
        )
    if words:
        return "detected", words[0]
    # A log may end anywhere, as after a kill: its steps are fewer then, and the ones that they were. But nothing sound may be behind them.
    shown = found["steps"] + len(found["logged"])
    if behind := [step for step in sound_records(run) if step >= shown]:
        return "LOST", f"{shown} steps are shown, and step {min(behind)} is still in the log"
    found["logged"] = found["logged"] + want["logged"][len(found["logged"]) :]
    wrong = [name for name in want if not alike(found.get(name), want[name])]
    return ("WRONG", ", ".join(wrong)) if wrong else ("harmless", "")


def sound(folder: Path) -> dict[str, dict[str, Any]]:
    """Records the runs, each in a folder of its name; what can be read of each."""
    recording.TOGETHER = 1
    for name, options in {"whole": {}, "thin": {"thin": 4}, "standard": {"codec": "standard"}, "stored": {"gradients": "store"}}.items():
        record(folder / name, **options)
    # The training has ended, so its last copy is the one of interest; a thin run's copy would be no other kind.
    shutil.rmtree(folder / "standard.killed")
    return {path.name: everything(path)[1] for path in sorted(folder.iterdir())}


def study(out: Path, count: int, seed: int, tell: Callable[[str], None] = print) -> Counter[tuple[str, str]]:
    """How often each kind of damage came to what."""
    want = sound(out / "sound")
    found = Counter[tuple[str, str]]()
    for k in range(count):
        rng = random.Random(f"{seed} {k}")
        name, kind = rng.choice(sorted(want)), rng.choice(KINDS)
        shutil.rmtree(out / "damaged", ignore_errors=True)
        run = out / "damaged" / name
        shutil.copytree(out / "sound" / name, run)
        kind(run, rng)
        came, words = outcome(run, want[name])
        found[kind.__name__, came] += 1
        if came not in GOOD:
            tell(f"{came}: {kind.__name__} of {name}, number {k}: {words[:300]}")
    return found


def table(found: Counter[tuple[str, str]]) -> str:
    """Kinds of damage by what came of them."""
    kinds, ends = sorted({kind for kind, _ in found}), [*GOOD, *sorted({end for _, end in found} - {*GOOD})]
    lines = ["| damage | " + " | ".join(ends) + " |", "|---" * (len(ends) + 1) + "|"]
    lines += [f"| {kind.replace('_', ' ')} | " + " | ".join(str(found[kind, end]) for end in ends) + " |" for kind in kinds]
    return "\n".join([*lines, "| all | " + " | ".join(str(sum(found[kind, end] for kind in kinds)) for end in ends) + " |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/corruption"))
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    found = study(given.out, given.count, given.seed)
    print(table(found))
    if any(end not in GOOD for _, end in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
