"""The table: every optimizer setting that has a rule, and the small trainings that the tests share."""

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import ASGD, SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR
from torch.utils.data import TensorDataset

import explaind
from explaind.record import recorder
from explaind.store.checksums import text_checksum

sys.path.append(str(Path(__file__).parents[1] / "experiments" / "lion"))
from lion import Lion


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    make: Callable[[list[Tensor]], Optimizer]
    schedule: Callable[[Optimizer], Any] | None = None

    def __str__(self) -> str:
        return self.name


class ByHand:
    """What a loop may do to a parameter group between two steps, as a schedule: every option takes its values in turn."""

    def __init__(self, optimizer: Optimizer, options: dict[str, tuple[Any, ...]]) -> None:
        self.group, self.options, self.count = optimizer.param_groups[0], options, 0

    def step(self) -> None:
        self.count += 1
        self.group.update({name: values[self.count % len(values)] for name, values in self.options.items()})


ADAMS = (Adam, AdamW, NAdam, RAdam, Adamax)
DEFAULTS: dict[type[Optimizer], dict[str, Any]] = {kind: {"lr": 0.03, "betas": (0.8, 0.95)} for kind in (*ADAMS, Lion)}
DEFAULTS |= {SGD: {"lr": 0.2}, ASGD: {"lr": 0.1, "t0": 2.0}, Rprop: {"lr": 0.01}}


def row(name: str, kind: type[Optimizer], **options: Any) -> Case:
    return Case(name, lambda params: kind(params, **{**DEFAULTS.get(kind, {"lr": 0.03}), **options}))


def has(kind: type[Optimizer], option: str) -> bool:
    """Whether an optimizer of this torch has an option."""
    return option in inspect.signature(kind).parameters


def in_groups(kind: type[Optimizer], first: dict[str, Any], second: dict[str, Any]) -> Callable[[list[Tensor]], Optimizer]:
    """The later parameters come first: the optimizer's order need not be the model's."""
    return lambda params: kind([{"params": params[2:], **first}, {"params": params[:2], **second}], lr=0.05)


OPTIMIZERS = (
    row("sgd", SGD),
    row("sgd momentum", SGD, momentum=0.8),
    row("sgd little momentum", SGD, momentum=1e-3),  # fades within the run, which the applied view makes use of
    row("sgd momentum dampening", SGD, momentum=0.8, dampening=0.3),
    row("sgd nesterov", SGD, momentum=0.8, nesterov=True),
    row("sgd l2", SGD, weight_decay=0.1),
    row("sgd momentum l2", SGD, momentum=0.8, dampening=0.3, weight_decay=0.1),
    row("sgd nesterov l2 maximize", SGD, momentum=0.8, nesterov=True, weight_decay=0.1, maximize=True),
    row("sgd maximize", SGD, maximize=True),
    row("sgd foreach", SGD, momentum=0.8, foreach=True),
    row("sgd fused", SGD, momentum=0.8, fused=True),
    row("adam", Adam),
    row("adam l2", Adam, weight_decay=0.1),
    row("adam l2 maximize", Adam, weight_decay=0.1, eps=1e-2, maximize=True),
    row("adam amsgrad", Adam, amsgrad=True),
    *([row("adam decoupled", Adam, weight_decay=0.1, decoupled_weight_decay=True)] if has(Adam, "decoupled_weight_decay") else []),
    row("adam for-loop", Adam, foreach=False),
    row("adam foreach", Adam, weight_decay=0.1, foreach=True),
    row("adam fused", Adam, weight_decay=0.1, fused=True),
    row("adam tensor lr", Adam, lr=torch.tensor(0.03, dtype=torch.float64)),  # torch divides a float32 one in float32
    row("adamw", AdamW, weight_decay=0.5),
    row("adamw amsgrad", AdamW, weight_decay=0.5, amsgrad=True),
    row("adamw maximize", AdamW, weight_decay=0.5, eps=1e-2, maximize=True),
    row("adamw for-loop", AdamW, weight_decay=0.5, foreach=False),
    row("adamw foreach", AdamW, weight_decay=0.5, foreach=True),
    row("adamw fused", AdamW, weight_decay=0.5, fused=True),
    row("adadelta", Adadelta, lr=1.0, rho=0.8),
    row("adadelta l2 maximize", Adadelta, lr=0.5, eps=1e-3, weight_decay=0.1, maximize=True),
    row("adadelta for-loop", Adadelta, lr=1.0, foreach=False),
    row("adafactor", Adafactor, weight_decay=0.1),
    row("adafactor maximize", Adafactor, lr=0.3, d=1.5, beta2_decay=-0.6, eps=(1e-12, 1e-2), maximize=True, foreach=False),
    row("adagrad", Adagrad, weight_decay=0.1, lr_decay=0.2),
    row("adagrad fused", Adagrad, initial_accumulator_value=0.1, fused=True),
    row("adagrad maximize", Adagrad, eps=1e-2, maximize=True, foreach=True),
    row("adamax", Adamax, weight_decay=0.1),
    row("adamax maximize", Adamax, eps=1e-2, maximize=True, foreach=False),
    row("asgd", ASGD, lambd=0.01, weight_decay=0.1),
    row("asgd maximize", ASGD, lambd=0.2, alpha=0.6, maximize=True, foreach=False),
    row("lion", Lion, weight_decay=0.1),
    row("nadam", NAdam, weight_decay=0.1),
    row("nadam decoupled maximize", NAdam, weight_decay=0.1, decoupled_weight_decay=True, momentum_decay=0.05, maximize=True),
    row("nadam for-loop", NAdam, eps=1e-2, foreach=False),
    row("radam", RAdam, weight_decay=0.1),
    row("radam decoupled", RAdam, betas=(0.8, 0.7), eps=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    row("radam rectified early maximize", RAdam, betas=(0.5, 0.9), maximize=True, foreach=False),
    row("rmsprop", RMSprop, alpha=0.8, weight_decay=0.1),
    row("rmsprop momentum", RMSprop, alpha=0.8, momentum=0.5, eps=1e-2),
    row("rmsprop centred momentum maximize", RMSprop, alpha=0.8, momentum=0.5, centered=True, weight_decay=0.1, maximize=True),
    row("rmsprop centred", RMSprop, alpha=0.8, centered=True, foreach=False),
    row("rprop", Rprop),
    row("rprop maximize", Rprop, lr=0.02, etas=(0.4, 1.3), step_sizes=(1e-4, 0.05), maximize=True, foreach=False),
    Case("sgd in groups", in_groups(SGD, {"momentum": 0.8}, {"lr": 0.3, "weight_decay": 0.1, "nesterov": False})),
    Case("adam in groups", in_groups(Adam, {"betas": (0.7, 0.9)}, {"lr": 0.01, "weight_decay": 0.3, "amsgrad": True})),
    Case("adamw in groups", in_groups(AdamW, {"betas": (0.7, 0.9), "weight_decay": 0.0}, {"lr": 0.01, "weight_decay": 0.3})),
    replace(row("sgd scheduled", SGD, momentum=0.8, weight_decay=0.1), schedule=lambda optimizer: ExponentialLR(optimizer, 0.7)),
    replace(row("adamw one-cycle", AdamW, weight_decay=0.5), schedule=lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=20)),
)
MUONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("muon", {"adjust_lr_fn": "original"}),  # what None means
    (
        "muon plain, three iterations",
        {
            "lr": 0.05,
            "nesterov": False,
            "momentum": 0.8,
            "weight_decay": 0.3,
            "adjust_lr_fn": "match_rms_adamw",
            "ns_steps": 3,
            "ns_coefficients": (3.0, -3.2, 1.2),
            "eps": 1e-5,
        },
    ),
)
"""Option sets of torch's Muon, which takes matrices alone: other tensors go to another optimizer."""
every_optimizer = pytest.mark.parametrize("case", OPTIMIZERS, ids=str)


def optimizer_named(name: str) -> Case:
    return next(case for case in OPTIMIZERS if case.name == name)


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers of their own seed, whatever was drawn before."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DTYPE = torch.float64
"""Of the training."""
DATA = TensorDataset(normal(8, 3, seed=1), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1]))
QUERIES = normal(3, 3, seed=2)


def losses(model: nn.Module, batch: Any) -> Tensor:
    """Tensor[batch]"""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def measure(model: nn.Module, queries: Tensor) -> Tensor:
    """Tensor[query, output]"""
    return model(queries).log_softmax(-1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def frozen() -> nn.Module:
    model = mlp()
    model[0].bias.requires_grad_(False)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


class Sometimes(nn.Module):
    """A branch that only eval mode takes, so that its parameters have no gradient in train mode; and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = nn.Linear(3, 2), nn.Linear(3, 2)
        self.register_buffer("scale", torch.tensor([0.5, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return self.trunk(x).tanh() if self.training else self.trunk(x).tanh() + self.branch(x).sin()


STEPS = (((0, 1, 2, 3),), ((4, 5, 6),), ((7, 0, 5),), ((1, 1, 2),), ((6,),), ((3, 4, 7, 2, 0),), ((5, 6),))
"""Example ids by step and micro-batch: batches of different sizes, one example twice in a batch, seven steps in blocks of three."""
MICRO_BATCHES = (((0, 1, 2), (3,)), ((4, 5),), ((7, 0), (5, 6), (0, 1)), ((2,), (2,)))


@dataclass(frozen=True)
class Problem:
    """A small training: everything but its optimizer."""

    name: str
    network: Callable[[], nn.Module] = mlp
    steps: tuple[tuple[tuple[int, ...], ...], ...] = STEPS
    reduction: str = "mean"
    weight: Callable[[Tensor], Tensor] | None = None
    """ids -> factor on each loss, where it is neither a mean nor a sum."""
    trains: Callable[[int], bool] = field(default=lambda step: True)
    """Whether the model is in train mode at a step."""
    touch: Callable[[nn.Module], Any] | None = None
    """What is done to gradients before the optimizer steps."""
    response: Callable[[int, int], float] | None = None
    """What is left of a step's gradient at a later one, where `touch` mixes the gradients of several steps."""

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return self.network().to(DTYPE)

    def weights(self, ids: Tensor) -> Tensor:
        if self.weight is not None:
            return self.weight(ids)
        return torch.full((len(ids),), 1 / len(ids) if self.reduction == "mean" else 1.0, dtype=DTYPE)


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.4), nn.Linear(4, 2))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, momentum=0.3), nn.Tanh(), nn.Linear(4, 2))


def clip_halves(model: nn.Module) -> None:
    """Both parts of a model on their own, the second one hardly ever."""
    nn.utils.clip_grad_norm_(model[0].parameters(), 0.05)
    nn.utils.clip_grad_norm_(model[2].parameters(), 1.0)


PLAIN = Problem("mean loss")
PROBLEMS = (
    PLAIN,
    Problem("sum loss", reduction="sum"),
    Problem("weighted loss", weight=lambda ids: 0.1 + ids.double() / 10),
    Problem("micro-batches", steps=MICRO_BATCHES),
    Problem("frozen parameter", frozen),
    Problem("tied weights", tied),
    Problem("branch unused in some steps", Sometimes, trains=lambda step: step in (1, 2, 5)),
    Problem("clipped by norm", touch=lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.3)),
    Problem("clipped by value", touch=lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.05)),
    Problem("clipped in micro-batches", steps=MICRO_BATCHES, touch=lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.2)),
)
WHOLE = (
    Problem("dropout", dropping),
    Problem("dropout in micro-batches", dropping, steps=MICRO_BATCHES, trains=lambda step: step != 1),
    Problem("batch norm", normalised, steps=tuple(step for step in STEPS if len(step[0]) > 1)),
    Problem(
        "batch norm, partly in eval mode",
        normalised,
        steps=(((0, 1, 2), (3, 4)), ((5, 6, 7),), ((7, 0), (5, 6), (0, 1))),
        trains=lambda step: step != 1,
    ),
    Problem("dropout, clipped", dropping, touch=lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.3)),
)
"""Trainings in which only the whole batch has a gradient."""


def problem_named(name: str) -> Problem:
    return next(problem for problem in (*PROBLEMS, *WHOLE) if problem.name == name)


every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


def shorten_blocks(patch: pytest.MonkeyPatch, steps: int = 3) -> None:
    """Let the recorder write single blocks of `steps` steps, for the 26 float64 parameters of ``mlp``; a few more for smaller models."""
    patch.setattr(recorder, "BLOCK_BYTES", steps * 2 * 26 * 8)
    patch.setattr(recorder, "TOGETHER", 1)


def resealed(path: Path) -> None:
    """Give a run the checksums that it should have after its attributes or its marker were edited, as somebody would who means it."""
    commit = json.loads((path / "commit.json").read_text())
    commit["checksums"]["manifest"] = text_checksum(json.loads((path / "zarr.json").read_text())["attributes"].get("manifest"))
    commit.pop("crc", None)
    (path / "commit.json").write_text(json.dumps({**commit, "crc": text_checksum(commit)}))


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def gradient(problem: Problem, model: nn.Module, step: int, recorder: explaind.Recorder | None = None) -> None:
    """One step of an ordinary training loop, up to ``optimizer.step()``."""
    model.train(problem.trains(step))
    model.zero_grad()
    for index, part in enumerate(problem.steps[step]):
        ids = torch.tensor(part)
        torch.manual_seed(100 * step + index)  # for models that draw random numbers
        if recorder is not None:
            recorder.examples(ids, None if problem.weight is None else problem.weight(ids))
        x, y = DATA[ids]
        (losses(model, (x.to(DTYPE), y)) @ problem.weights(ids)).backward()
    if problem.touch is not None:
        problem.touch(model)


def train(problem: Problem, model: nn.Module, optimizer: Optimizer, case: Case, recorder: explaind.Recorder | None = None) -> None:
    """All steps of a problem."""
    scheduler = case.schedule(optimizer) if case.schedule else None
    for step in range(len(problem.steps)):
        gradient(problem, model, step, recorder)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def recorded(path: Path, problem: Problem = PLAIN, case: Case = OPTIMIZERS[1], warm: bool = False, **options: Any) -> explaind.Run:
    """A finished run; `warm`: the optimizer has already trained once when the recording begins."""
    model = problem.model()
    optimizer = case.make(trainable(model))
    if warm:
        train(problem, model, optimizer, case)
    with explaind.record(optimizer, model, path, reduction=problem.reduction, **options) as recorder:
        train(problem, model, optimizer, case, recorder)
    return explaind.open(path)


def blank(problem: Problem) -> nn.Module:
    """The model class alone: every number that a decomposition needs must come from the run."""
    model = problem.model()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    return model


def decomposed(run: explaind.Run, problem: Problem = PLAIN, **options: Any) -> explaind.Ledger:
    """All axes kept and four Gauss nodes, unless told otherwise."""
    asked = {"keep": ("query", "output", "example", "layer", "step"), "rule": "gauss:4", "data": DATA, "losses": losses, "measure": measure}
    return explaind.decompose(run, blank(problem), queries=QUERIES, **{**asked, **options})
