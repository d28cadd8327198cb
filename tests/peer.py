"""One run of the published implementation (explaind 0.1.0), turned into a run of ours."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from explaind.rules import rule_named
from explaind.store.manifest import Layer, Manifest, Optimized
from explaind.store.row import StepRow
from explaind.store.writer import RunWriter
from explaind.tasks.modular import PaperNetwork

FILE = np.load(Path(__file__).parent / "data" / "peer_adamw.npz")
SETTINGS = json.loads(str(FILE["settings"]))
OPTIONS = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.98,
    "eps": 1e-8,
    "weight_decay": SETTINGS["decay"],
    "amsgrad": 0.0,
    "maximize": 0.0,
    "decoupled": 1.0,
}
NODES = SETTINGS["nodes"]


def theirs(name: str) -> str:
    """The published implementation's name of one of our tensors."""
    renamed = {"embedding.weight": "input_emb.weight", "positions": "positional_encoding.pe"}
    if name.startswith("heads."):
        _, head, kind, _ = name.split(".")
        return f"head{int(head) + 1}_{kind}r.weight"
    return renamed.get(name, name)


def network() -> PaperNetwork:
    """The architecture of the file, at its width."""
    return PaperNetwork(SETTINGS["p"] + 2, SETTINGS["width"], 4, SETTINGS["mlp"], "relu")


def data() -> TensorDataset:
    return TensorDataset(torch.from_numpy(FILE["x_train"]), torch.from_numpy(FILE["y_train"]))


def losses(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def write_run(path: Path) -> None:
    """Its parameters and batches in our store. The file lacks the second moment, which is replayed here in float64."""
    model = network().double()
    names = [n for n, _ in model.named_parameters()]
    thetas = np.concatenate([FILE[f"theta/{theirs(n)}"].reshape(SETTINGS["steps"] + 1, -1) for n in names], axis=1)
    sizes = [p.numel() for p in model.parameters()]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    layers = tuple(Layer(n, tuple(p.shape), o, p.numel(), 0) for (n, p), o in zip(model.named_parameters(), offsets, strict=False))
    manifest = Manifest(
        optimizers=(Optimized("AdamW", "torch.optim.AdamW", (), rule_named("AdamW").options, ()),),
        layers=layers,
        dtype="float32",
        block=16,
        reduction="mean",
        model="peer",
        modules=tuple(n for n, _ in model.named_modules()),
        examples=40,
        seed=43,
        random_bytes=0,
        threads=1,
        device="cpu",
        versions={},
        config=None,
    )
    writer = RunWriter(path, manifest, thetas[0], {}, None, momentum=True, preconditioner=True)
    second = np.zeros(sum(sizes))
    for step, ids in enumerate(FILE["batches"]):
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(torch.from_numpy(thetas[step]).double(), model.parameters())
        model.zero_grad()
        batch = torch.from_numpy(FILE["x_train"][ids]), torch.from_numpy(FILE["y_train"][ids])
        losses(model, batch).mean().backward()
        gradient = np.concatenate([np.zeros(p.numel()) if p.grad is None else p.grad.flatten().numpy() for p in model.parameters()])
        second = 0.98 * second + 0.02 * gradient**2
        age = np.array([-1 if p.grad is None else step for p in model.parameters()], dtype=np.int32)
        writer.add(
            StepRow(
                ids.astype(np.int64),
                np.zeros(len(ids), np.int32),
                np.full(len(ids), 1 / len(ids)),
                np.array([list(OPTIONS.values())] * len(layers)),
                age,
                tuple(False for _ in model.modules()),
                second.astype(np.float32),
                np.zeros(sum(sizes), np.float32) if step == 0 else None,
            ),
            thetas[step + 1],
        )
    writer.close()
