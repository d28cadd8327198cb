"""Progress measures of grokking on addition and subtraction mod p (Nanda et al., arXiv 2301.05217, section 5)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explaind.analysis.fourier import amplitudes, by_neuron, frequencies, gini, power
from explaind.analysis.table import Table
from explaind.errors import RequestError
from explaind.replay.functional import fitted
from explaind.store.reader import Run
from explaind.tasks.modular import ModularArithmetic

STATES = 100
"""About how many states of a run are looked at."""
CLEAN = 0.85
"""A neuron is of one frequency when that explains at least this share of its variance."""
LIVE = 0.05
"""A frequency is a key frequency when at least this share of all neurons are of it."""
SIGN = {"add": 1, "subtract": -1}
"""The answer is a function of a + sign · b; the other sign is the control."""


class Square:
    """A network on all ordered pairs (a, b). Where the training set holds a ≥ b alone, each pair is put in that order first."""

    def __init__(self, run: Run, task: ModularArithmetic) -> None:
        if not isinstance(task, ModularArithmetic) or task.operation not in SIGN:
            raise RequestError(
                "progress measures need a sum or a difference",
                expected=f"the task modular with operation {' or '.join(SIGN)}",
                got=getattr(task, "operation", type(task).__name__),
                do="ask for the other analyses",
            )
        frequencies(task.p)
        self.run, self.task, self.p = run, task, task.p
        self.model = fitted(task.model(), run.manifest.layers, run.constants).eval()
        a, b = torch.cartesian_prod(torch.arange(self.p), torch.arange(self.p)).unbind(1)
        first, second = (torch.maximum(a, b), torch.minimum(a, b)) if task.pairs == "unordered" else (a, b)
        self.tokens, self.sum = task.tokens(first, second), (first + second) % self.p
        self.difference = (a - b) % self.p
        self.answers = self.sum if task.operation == "add" else (first - second) % self.p
        self.masks = {split: self._mask(split) for split in ("train", "val")}

    def _mask(self, split: str) -> Tensor:
        """Which pairs [a · p + b] a split holds, in either order where order does not matter."""
        tokens = self.task.data(split).tensors[0]
        a, b = tokens[:, 0], tokens[:, -2]
        mask = torch.zeros(self.p, self.p, dtype=torch.bool)
        mask[a, b] = True
        return (mask | mask.T if self.task.pairs == "unordered" else mask).reshape(-1)

    def at(self, step: int) -> nn.Module:
        """The model with the parameters before a step, or after the last one."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, values in self.run.theta(step).items():
                parameters[name].copy_(torch.from_numpy(values))
        return self.model

    def logits(self) -> Tensor:
        """Float64[pair, output] of the model as it stands."""
        with torch.no_grad():
            return self.model(self.tokens).double()

    def hidden(self) -> Tensor:
        """Float64[a, b, neuron]: the MLP's neurons after their non-linearity."""
        found: list[Tensor] = []
        linear2 = self.model.get_submodule("linear2")
        handle = linear2.register_forward_pre_hook(lambda module, given: found.append(given[0].detach().double()))
        try:
            self.logits()
        finally:
            handle.remove()
        return found[0].reshape(self.p, self.p, -1)


def along(logits: Tensor, numbers: Tensor, p: int, chosen: Sequence[int]) -> Tensor:
    """The part of logits [pair, output] that is a wave of the chosen frequencies in a number mod p of each pair: [pair, output].

    The projection on cos and sin of 2πk · number / p; numbers [pair] must hold each of 0 … p − 1 equally often.
    """
    angle = 2 * torch.pi * torch.as_tensor(chosen, dtype=logits.dtype)[:, None] * numbers / p
    waves = torch.cat([angle.cos(), angle.sin()]) * (2 / len(numbers)) ** 0.5  # orthonormal rows
    return waves.T @ (waves @ logits)


def losses_without_waves(logits: Tensor, square: Square, numbers: Tensor, chosen: Sequence[int]) -> tuple[float, float]:
    """(restricted loss over all pairs, excluded loss over training pairs) in nats, for the waves of the chosen frequencies."""
    part = along(logits, numbers, square.p, chosen)
    train = square.masks["train"]
    restricted = F.cross_entropy(logits.mean(0) + part, square.answers)
    excluded = F.cross_entropy((logits - part)[train], square.answers[train])
    return float(restricted), float(excluded)


def key_frequencies(run: Run, task: ModularArithmetic, step: int | None = None) -> Table:
    """How much of the network is of each frequency, at a step (by default at the end): one row a frequency.

    neurons    share of the MLP's neurons that are of this frequency (``CLEAN``)
    embedding, decoder  share of the variance over numbers of the embedding and of the decoder's rows
    key        whether neurons ≥ ``LIVE``
    """
    square = Square(run, task)
    square.at(run.steps if step is None else step)
    best, share = by_neuron(square.hidden().numpy())
    own = frequencies(square.p)
    neurons = np.array([((best == k) & (share >= CLEAN)).mean() for k in own])
    embedding, decoder = _tables(square)
    return Table(
        "key_frequencies",
        f"neurons = share of neurons of which one frequency explains ≥ {CLEAN} of the variance over (a, b); key: neurons ≥ {LIVE}",
        "Nanda et al. (arXiv 2301.05217), section 4.1",
        {"frequency": own, "neurons": neurons, "embedding": power(embedding), "decoder": power(decoder), "key": neurons >= LIVE},
    )


def progress(run: Run, task: ModularArithmetic, chosen: Sequence[int] | None = None, states: int = STATES) -> Table:
    """Progress measures along a run, losses in nats: one row a state.

    restricted  loss over all pairs when logits keep only their mean and the waves of the key frequencies in a + b (a − b where that is
                the answer)
    excluded    loss over training pairs when these waves are taken out
    …_difference  the same with waves in the other of a + b and a − b: the control
    chosen      key frequencies; by default those of the last state (``key_frequencies``)
    """
    keys = key_frequencies(run, task)
    own = keys["frequency"][keys["key"]].tolist() if chosen is None else list(chosen)
    square = Square(run, task)
    numbers = (square.sum, square.difference) if SIGN[task.operation] > 0 else (square.difference, square.sum)
    rows = list(_rows(square, own, numbers, run.some_states(states)))
    return Table(
        "progress",
        f"restricted: mean logit + waves of frequencies {own} in the answer's direction, all pairs; excluded: logits without them, "
        "training pairs; difference: the same in the other direction; squared_weights Σθ²; Gini of the Fourier norms",
        "Nanda et al. (arXiv 2301.05217), section 5.1; the difference direction as control",
        {name: np.array([row[name] for row in rows]) for name in rows[0]},
    )


def _rows(square: Square, chosen: Sequence[int], numbers: tuple[Tensor, Tensor], steps: Sequence[int]) -> Iterator[dict[str, float]]:
    for step in steps:
        model, logits = square.at(step), square.logits()
        row: dict[str, float] = {"step": step}
        for split, mask in square.masks.items():
            row[f"{split}_loss"] = float(F.cross_entropy(logits[mask], square.answers[mask]))
        row["restricted"], row["excluded"] = losses_without_waves(logits, square, numbers[0], chosen)
        row["restricted_difference"], row["excluded_difference"] = losses_without_waves(logits, square, numbers[1], chosen)
        row["squared_weights"] = float(sum(t.detach().double().square().sum() for t in model.parameters()))
        row["gini_embedding"], row["gini_decoder"] = (gini(amplitudes(matrix)) for matrix in _tables(square))
        yield row


def _tables(square: Square) -> tuple[np.ndarray, np.ndarray]:
    """The rows of embedding and decoder that stand for numbers: float64 [number, width] each."""
    parameters = dict(square.model.named_parameters())
    embedding, decoder = (parameters[name].detach().double().numpy()[: square.p] for name in ("embedding.weight", "decoder.weight"))
    return embedding, decoder
