"""Modular arithmetic: learn a ∘ b mod p from part of the table, the classic of grokking.

Networks: "paper", the one-layer transformer of Ranjan et al.'s ExPLAIND study (theory.md section 7), and "nanda", that of
Nanda et al., "Progress measures for grokking via mechanistic interpretability" (arXiv 2301.05217).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from explaind.errors import ConfigError
from explaind.tasks.measures import classification
from explaind.tasks.task import Batch, Measure

Activation = Literal["relu", "gelu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class Operation(NamedTuple):
    """One way to combine a and b; the result is taken mod p."""

    combine: Callable[[Tensor, Tensor], Tensor]
    words: str
    sign: str
    commutative: bool


OPERATIONS = {
    "add": Operation(lambda a, b: a + b, "{} + {}", "+", True),
    "subtract": Operation(lambda a, b: a - b, "{} − {}", "−", False),
    "multiply": Operation(lambda a, b: a * b, "{} × {}", "×", True),
    "square_sum": Operation(lambda a, b: a * a + b * b, "{}² + {}²", "²+²", True),
}


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v, without a mask: [..., to, d], [..., from, d], [..., from, e] -> [..., to, e].

    Written out because forward-mode differentiation fails through torch's fused attention.
    """
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return scores.softmax(-1) @ value


class SharedHead(nn.Module):
    """A head in which one matrix makes query, key and value."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.encode = nn.Linear(width, size, bias=False)
        self.decode = nn.Linear(size, width, bias=False)

    def forward(self, residual: Tensor) -> Tensor:
        """[batch, token, width] -> [batch, 1, width], at the last position."""
        code = self.encode(residual)
        return self.decode(attend(code[..., -1:, :], code, code))


class PaperNetwork(nn.Module):
    """The paper's transformer. Only the last position is read, so only the last position is computed."""

    def __init__(self, vocabulary: int, width: int, heads: int, mlp: int, activation: Activation) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        # The published model registers this table and never reads it; it stays, so that parameter counts agree with the paper's.
        self.positions = nn.Parameter(torch.zeros(1, 10, width))
        self.heads = nn.ModuleList(SharedHead(width, width // heads) for _ in range(heads))
        self.linear1 = nn.Linear(width, mlp)
        self.linear2 = nn.Linear(mlp, width)
        self.decoder = nn.Linear(width, vocabulary, bias=False)
        self.activation = ACTIVATIONS[activation]

    def forward(self, tokens: Tensor) -> Tensor:
        """Int[batch, token] -> logits [batch, vocabulary] at the last position."""
        embedded = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        attended = torch.stack([head(embedded) for head in self.heads]).sum(0).squeeze(-2)  # [batch, width]
        hidden = self.activation(self.linear1(attended))
        return self.decoder(attended + self.activation(self.linear2(hidden)))


class NandaNetwork(nn.Module):
    """Nanda et al.'s transformer: one layer with a residual stream and positions, no norm; matrices start as randn / √width."""

    def __init__(self, vocabulary: int, classes: int, length: int, width: int, heads: int, mlp: int, activation: Activation) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(length, width))
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.linear1 = nn.Linear(width, mlp)
        self.linear2 = nn.Linear(mlp, width)
        self.decoder = nn.Linear(width, classes, bias=False)
        self.head_count = heads
        self.activation = ACTIVATIONS[activation]
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=width**-0.5)
            else:
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Int[batch, token] -> logits [batch, class] at the last position."""
        embedded = self.embedding(tokens) + self.positions
        last = embedded[..., -1:, :]
        query, key, value = (self._split(x) for x in (self.query(last), self.key(embedded), self.value(embedded)))
        attended = attend(query, key, value).transpose(-2, -3).flatten(-2)  # [batch, 1, width]
        residual = (last + self.mix(attended)).squeeze(-2)
        return self.decoder(residual + self.linear2(self.activation(self.linear1(residual))))

    def _split(self, x: Tensor) -> Tensor:
        """[batch, token, width] -> [batch, head, token, width / head]."""
        return x.unflatten(-1, (self.head_count, -1)).transpose(-2, -3)


@dataclass(frozen=True)
class ModularArithmetic:
    """a ∘ b mod p, of which the defaults are the paper's run: 89,664 parameters, 4000 of 6441 sums to train on.

    ``pairs="unordered"`` keeps a ≥ b, for operations where the order does not matter.
    The training set is ``train_fraction`` of the pairs or ``train_examples`` of them (neither: the paper's 4000/6441),
    the validation set ``val_examples`` of the rest, or all the rest.
    """

    p: int = 113
    operation: Literal["add", "subtract", "multiply", "square_sum"] = "add"
    pairs: Literal["unordered", "ordered"] = "unordered"
    train_fraction: float | None = None
    train_examples: int | None = None
    val_examples: int | None = None
    split_seed: int = 0
    network: Literal["paper", "nanda"] = "paper"
    width: int = 64
    heads: int = 4
    mlp: int = 512
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_sizes()
        self._check_counts()

    def model(self) -> nn.Module:
        """A fresh network of the option ``network``, in float32."""
        if self.network == "paper":
            return PaperNetwork(self.p + 2, self.width, self.heads, self.mlp, self.activation)
        return NandaNetwork(self.p + 1, self.p, 3, self.width, self.heads, self.mlp, self.activation)

    def data(self, split: str) -> TensorDataset:
        """Examples (Int[token], Int[]): the tokens and the answer."""
        if split not in self._splits:
            raise ConfigError("unknown split", where="modular", expected=" or ".join(self._splits), got=repr(split))
        return self._splits[split]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Float[batch]: the cross-entropy, in nats."""
        return F.cross_entropy(self._logits(model, batch), self.target(batch), reduction="none")

    def measures(self) -> Mapping[str, Measure]:
        """Those of any classifier."""
        return classification(self._logits, self.target)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Int[batch]."""
        return self._logits(model, batch).argmax(-1)

    def target(self, batch: Batch) -> Tensor:
        """Int[batch]."""
        return batch[1]

    def describe(self, split: str, index: int) -> str:
        """Such as "7 + 9 = 3" (mod 13)."""
        tokens, answer = self.data(split)[index]
        a, b = int(tokens[0]), int(tokens[-2])
        return f"{OPERATIONS[self.operation].words.format(a, b)} = {int(answer)}"

    def outputs(self) -> Sequence[str]:
        """The numbers 0 … p − 1; the paper's decoder also has a row for each of the two signs."""
        numbers = tuple(str(n) for n in range(self.p))
        return (*numbers, OPERATIONS[self.operation].sign, "=") if self.network == "paper" else numbers

    def layer_groups(self) -> Mapping[str, Sequence[str]]:
        """The parts of the paper's study, from input to output; names and patterns of parameter tensors."""
        inside: dict[str, tuple[str, ...]]
        if self.network == "paper":
            inside = {"embedding": ("embedding.*",), "attention in": ("heads.*.encode.*",), "attention out": ("heads.*.decode.*",)}
        else:
            attention = {"attention in": ("query.*", "key.*", "value.*"), "attention out": ("mix.*",)}
            inside = {"embedding": ("embedding.*", "positions"), **attention}
        return {**inside, "linear1": ("linear1.*",), "linear2": ("linear2.*",), "decoder": ("decoder.*",)}

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0])

    @cached_property
    def _splits(self) -> dict[str, TensorDataset]:
        a, b = torch.cartesian_prod(torch.arange(self.p), torch.arange(self.p)).unbind(1)
        if self.pairs == "unordered":
            a, b = a[a >= b], b[a >= b]
        answers = OPERATIONS[self.operation].combine(a, b) % self.p
        order = torch.randperm(len(a), generator=torch.Generator().manual_seed(self.split_seed))
        train, val = self._counts()
        tokens = self.tokens(a, b)
        chosen = {"train": order[:train], "val": order[train : train + val]}
        return {split: TensorDataset(tokens[ids], answers[ids]) for split, ids in chosen.items()}

    def tokens(self, a: Tensor, b: Tensor) -> Tensor:
        """Int[pair], Int[pair] -> Int[pair, token]: a ∘ b = for the paper's network, a b = for Nanda's."""
        p = torch.full_like(a, self.p)
        return torch.stack([a, p, b, p + 1] if self.network == "paper" else [a, b, p], dim=1)

    def _total(self) -> int:
        return self.p * (self.p + 1) // 2 if self.pairs == "unordered" else self.p**2

    def _counts(self) -> tuple[int, int]:
        """Numbers of training and validation examples."""
        fraction = 4000 / 6441 if self.train_fraction is None else self.train_fraction
        train = round(fraction * self._total()) if self.train_examples is None else self.train_examples
        return train, self._total() - train if self.val_examples is None else self.val_examples

    def _check_choices(self) -> None:
        for option in ("operation", "pairs", "network", "activation"):
            choices = get_args(get_type_hints(type(self))[option])
            if getattr(self, option) not in choices:
                raise ConfigError(
                    "unknown choice", where=f"modular.{option}", expected=" | ".join(choices), got=repr(getattr(self, option))
                )
        if self.pairs == "unordered" and not OPERATIONS[self.operation].commutative:
            raise ConfigError(
                "the order matters", where="modular.pairs", got=f"unordered with {self.operation}", do='set pairs = "ordered"'
            )

    def _check_sizes(self) -> None:
        for option, least in {"p": 2, "width": 1, "heads": 1, "mlp": 1}.items():
            if getattr(self, option) < least:
                raise ConfigError("too small", where=f"modular.{option}", expected=f"at least {least}", got=getattr(self, option))
        if self.width % self.heads:
            do = "change width or heads"
            raise ConfigError("does not divide", where="modular.heads", expected=f"a divisor of width {self.width}", got=self.heads, do=do)

    def _check_counts(self) -> None:
        if self.train_fraction is not None and self.train_examples is not None:
            raise ConfigError(
                "two sizes of one training set", where="modular", got="train_fraction and train_examples", do="give one of them"
            )
        if self.train_fraction is not None and not 0 < self.train_fraction <= 1:
            raise ConfigError("not a share", where="modular.train_fraction", expected="more than 0, at most 1", got=self.train_fraction)
        train, val = self._counts()
        if train < 1 or val < 1 or train + val > self._total():
            raise ConfigError(
                "the splits do not fit",
                where="modular.train_fraction, train_examples, val_examples",
                expected=f"at least 1 each and at most {self._total()} together",
                got=f"{train} train and {val} val",
                do="change the fraction or the counts",
            )
