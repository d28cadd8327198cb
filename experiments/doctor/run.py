"""Does what the doctor says beforehand happen? Time and memory of whole decompositions beside its estimates from four steps.

python experiments/doctor/run.py [--small] [--out runs/doctor] [--only NAME] [--busy]

--busy takes the time of the processor for that of the clock on both sides, which others on the machine do not change.
Every set-up is recorded, examined and decomposed, the last two in processes of their own, so that peak memory is each one's own.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import explaind

EXAMPLES, BATCH, QUERIES = 512, 32, 16


def image(*shape: int) -> Callable[[], TensorDataset]:
    def made() -> TensorDataset:
        x = torch.randn(EXAMPLES, *shape, generator=torch.Generator().manual_seed(0))
        return TensorDataset(x, (x.flatten(1)[:, :3].sum(1) > 0).long())

    return made


def words() -> TensorDataset:
    x = torch.randint(0, 50, (EXAMPLES, 12), generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, 0] % 2)


def captions() -> TensorDataset:
    x = torch.randn(EXAMPLES, 32, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.roll(1, dims=1) + 0.1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.gru, self.out = nn.Embedding(50, 24), nn.GRU(24, 48, batch_first=True), nn.Linear(48, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.gru(self.table(tokens))[0][:, -1])


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=dropout, batch_first=True)
        self.out = nn.Linear(32, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.layer(self.table(tokens)).mean(1))


class Encoders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 16)) for _ in range(2))

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.left(batch[0]), self.right(batch[1])


def apart(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    left, right = model(batch)
    scores, own = left @ right.T, torch.arange(len(left))
    return (F.cross_entropy(scores, own, reduction="none") + F.cross_entropy(scores.T, own, reduction="none")) / 2


def mlp(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), *between, nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4 * 4, 2)
    )


def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=1e-3)]


def muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=1e-3)]


@dataclass(frozen=True)
class SetUp:
    """One training, and what is asked of it."""

    model: Callable[[], nn.Module]
    data: Callable[[], TensorDataset]
    losses: Callable[[nn.Module, Any], Tensor] = apart
    optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]] = adamw
    options: dict[str, Any] = field(default_factory=dict)
    autocast: bool = False
    thin: int | None = None


class Noisy:
    """Examples that are others each time that they are read."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[i]
        return x + 0.3 * torch.randn_like(x), y


def relabelled(data: TensorDataset) -> TensorDataset:
    return TensorDataset(data.tensors[0], 1 - data.tensors[1])


def smoothed(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.2)


def flat(model: nn.Module, batch: Any) -> Tensor:
    return apart(model, batch).sum()


SETUPS = {
    "mlp": SetUp(mlp, image(64)),
    "mlp by step": SetUp(mlp, image(64), options={"keep": ("query", "example", "layer", "step"), "windows": 10}),
    "cnn": SetUp(cnn, image(1, 14, 14)),
    "gru": SetUp(Recurrent, words),
    "transformer": SetUp(Transformer, words),
    "dropout": SetUp(lambda: mlp(nn.Dropout(0.2)), image(64)),
    "batch norm": SetUp(lambda: mlp(nn.BatchNorm1d(256)), image(64)),
    "contrastive": SetUp(Encoders, captions, contrastive),
    "two optimizers": SetUp(mlp, image(64), optimizers=muon),
    "autocast": SetUp(Transformer, words, autocast=True),
    "thin": SetUp(mlp, image(64), thin=20),
}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "augmentation": ({"data": Noisy(image(64)())}, "another one each time"),
    "changed labels": ({"data": relabelled(image(64)())}, "not the data of the training"),
    "another loss": ({"losses": smoothed}, "times the replayed ones"),  # of two classes that are told apart badly yet
    "a measure that is no number per query": ({"measure": flat}, "one number per query"),
}
"""What is asked of the mlp, and must be refused in these words."""


def recorded(setup: SetUp, path: Path, steps: int) -> None:
    torch.manual_seed(0)
    model, data = setup.model(), setup.data()
    optimizers, order = setup.optimizers(model), torch.Generator().manual_seed(1)
    given = optimizers[0] if len(optimizers) == 1 else optimizers
    with explaind.record(given, model, path, data=data, overwrite=True, thin=setup.thin) as recorder:
        for _ in range(steps):
            ids = torch.randperm(EXAMPLES, generator=order)[:BATCH]
            recorder.examples(ids)
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=setup.autocast):
                loss = setup.losses(model, data[ids]).mean()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()


def part(name: str, path: Path, what: str) -> dict[str, float]:
    """What the doctor says of a recorded set-up ("doctor"), or what happens ("decompose")."""
    setup = SETUPS[name]
    data = setup.data()
    asked = {"data": data, "losses": setup.losses, "queries": data[:QUERIES], "measure": setup.losses, **setup.options}
    run, model = explaind.open(path), setup.model()
    if what == "doctor":
        found = explaind.doctor(run, model, **asked)
        return {"seconds": found.seconds or 0.0, "memory": float(found.memory or 0), "ok": float(found.ok)}
    begin = time.perf_counter()
    ok = explaind.decompose(run, model, **asked).verify().ok
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0, "ok": float(ok)}


def refused(path: Path) -> list[dict[str, Any]]:
    """What the doctor says of questions that cannot be answered."""
    setup, rows = SETUPS["mlp"], []
    recorded(setup, path, 12)
    data = setup.data()
    for name, (wrong, words) in WRONG.items():
        asked = {"data": data, "losses": setup.losses, "queries": data[:QUERIES], "measure": setup.losses, **wrong}
        found = explaind.doctor(explaind.open(path), setup.model(), **asked).refused
        rows.append({"set-up": name, "refused": any(words in reason for reason in found), "reasons": found})
        print(f"{name:40} {'refused: ' + found[-1] if found else 'NOT REFUSED'}")
    shutil.rmtree(path)
    return rows


def in_its_own_process(name: str, path: Path, what: str, busy: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--part", what, "--only", name, "--run", str(path), *(["--busy"] if busy else [])]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def compared(name: str, path: Path, steps: int, busy: bool) -> dict[str, Any]:
    """Estimates over what happened."""
    recorded(SETUPS[name], path, steps)
    said, done = (in_its_own_process(name, path, what, busy) for what in ("doctor", "decompose"))
    shutil.rmtree(path)
    return {
        "set-up": name,
        "said_seconds": said["seconds"],
        "seconds": done["seconds"],
        "time_ratio": said["seconds"] / done["seconds"],
        "said_mib": said["memory"] / 2**20,
        "mib": done["memory"] / 2**20,
        "memory_ratio": said["memory"] / done["memory"],
        "ok": bool(said["ok"] and done["ok"]),
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/doctor"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--small", action="store_true", help="one set-up, few steps")
    parser.add_argument("--only", choices=SETUPS)
    parser.add_argument("--busy", action="store_true", help="time of the processor, for a machine with other work")
    parser.add_argument("--part", choices=("doctor", "decompose"), help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.busy:
        time.perf_counter = time.process_time
    if asked.part:
        print(json.dumps(part(asked.only, asked.run, asked.part)))
        return []
    names = [asked.only] if asked.only else ["contrastive"] if asked.small else list(SETUPS)
    asked.out.mkdir(parents=True, exist_ok=True)
    rows = []
    print("set-up           said s      s  ratio   said MiB    MiB  ratio")
    for name in names:
        row = compared(name, asked.out / "run", 24 if asked.small else asked.steps, asked.busy)
        rows.append(row)
        times = f"{row['said_seconds']:7.1f} {row['seconds']:6.1f} {row['time_ratio']:6.2f}"
        print(f"{name:15} {times} {row['said_mib']:10.0f} {row['mib']:6.0f} {row['memory_ratio']:6.2f}", flush=True)
    if not asked.only:
        rows += refused(asked.out / "run")
    (asked.out / "results.json").write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
