"""Handwritten digits: scikit-learn's 1797 images of 8 × 8 pixels, a small real data set that needs no download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from explaind.errors import ConfigError
from explaind.tasks.measures import classification
from explaind.tasks.task import Batch, Measure

Activation = Literal["relu", "gelu", "tanh"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}

IMAGES, SIDE, CLASSES, WHITE = 1797, 8, 10, 16.0


def mlp(hidden: int, activation: Activation) -> nn.Module:
    """Float[batch, 1, 8, 8] -> logits [batch, class], through one hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, hidden), ACTIVATIONS[activation](), nn.Linear(hidden, CLASSES))


def cnn(hidden: int, activation: Activation) -> nn.Module:
    """Float[batch, 1, 8, 8] -> logits [batch, class]; two convolutions of ``hidden`` channels, pooled by means, which are smooth."""
    act = ACTIVATIONS[activation]
    first = (nn.Conv2d(1, hidden, 3, padding=1), act(), nn.AvgPool2d(2))  # [batch, hidden, 4, 4]
    second = (nn.Conv2d(hidden, hidden, 3, padding=1), act(), nn.AvgPool2d(2))  # [batch, hidden, 2, 2]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(4 * hidden, CLASSES))


NETWORKS: dict[str, Callable[[int, Activation], nn.Module]] = {"mlp": mlp, "cnn": cnn}


@dataclass(frozen=True)
class Digits:
    """Which digit is it? ``hidden`` is the width of the MLP or the number of channels of the CNN.

    ``flipped`` is the share of training labels replaced by another class, drawn by ``flip_seed``; ``true_labels`` names them.
    """

    network: Literal["mlp", "cnn"] = "mlp"
    hidden: int = 64
    activation: Activation = "gelu"
    train_examples: int = 1200
    val_examples: int = 597
    split_seed: int = 0
    flipped: float = 0.0
    flip_seed: int = 0

    def __post_init__(self) -> None:
        for option in ("network", "activation"):
            choices = get_args(get_type_hints(type(self))[option])
            if getattr(self, option) not in choices:
                raise ConfigError("unknown choice", where=f"digits.{option}", expected=" | ".join(choices), got=repr(getattr(self, option)))
        for option in ("hidden", "train_examples", "val_examples"):
            if getattr(self, option) < 1:
                raise ConfigError("too small", where=f"digits.{option}", expected="at least 1", got=getattr(self, option))
        if self.train_examples + self.val_examples > IMAGES:
            got = f"{self.train_examples} train and {self.val_examples} val"
            raise ConfigError("the splits do not fit", where="digits", expected=f"at most {IMAGES} together", got=got, do="lower one")
        if not 0 <= self.flipped <= 1:
            raise ConfigError("not a share", where="digits.flipped", expected="0 to 1", got=self.flipped)

    def model(self) -> nn.Module:
        """A fresh network of the option ``network``, in float32, initialised as torch does."""
        return NETWORKS[self.network](self.hidden, self.activation)

    def data(self, split: str) -> TensorDataset:
        """Examples (Float[1, 8, 8] with values 0 … 1, Int[]): the image and its label."""
        if split not in self._splits:
            raise ConfigError("unknown split", where="digits", expected=" or ".join(self._splits), got=repr(split))
        return self._splits[split]

    def true_labels(self) -> dict[int, int]:
        """The training examples whose label was flipped: index -> the label before."""
        return {int(i): int(self._train_labels[i]) for i in self._flips}

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
        """Int[batch]: the label as it is trained on, flipped or not."""
        return batch[1]

    def describe(self, split: str, index: int) -> str:
        """Such as "a 7", or "a 7 labelled 3"."""
        label = int(self.data(split)[index][1])
        true = self.true_labels().get(index, label) if split == "train" else label
        return f"a {true}" if true == label else f"a {true} labelled {label}"

    def outputs(self) -> Sequence[str]:
        """The ten digits."""
        return tuple(str(digit) for digit in range(CLASSES))

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0])

    @cached_property
    def _everything(self) -> tuple[Tensor, Tensor]:
        """Float[image, 1, 8, 8], Int[image], in the order drawn by ``split_seed``."""
        images, labels = _load()
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(self.split_seed))
        return images[order], labels[order]

    @cached_property
    def _train_labels(self) -> Tensor:
        """Int[train], before any flip."""
        return self._everything[1][: self.train_examples]

    @cached_property
    def _flips(self) -> dict[int, int]:
        """The flipped training examples, in ascending order: index -> the label given."""
        generator = torch.Generator().manual_seed(self.flip_seed)
        chosen = torch.randperm(self.train_examples, generator=generator)[: round(self.flipped * self.train_examples)].sort().values
        shift = torch.randint(1, CLASSES, chosen.shape, generator=generator)
        return dict(zip(chosen.tolist(), ((self._train_labels[chosen] + shift) % CLASSES).tolist(), strict=True))

    @cached_property
    def _splits(self) -> dict[str, TensorDataset]:
        images, labels = (x.clone() for x in self._everything)
        for index, label in self._flips.items():
            labels[index] = label
        train, val = slice(self.train_examples), slice(self.train_examples, self.train_examples + self.val_examples)
        return {split: TensorDataset(images[ids], labels[ids]) for split, ids in (("train", train), ("val", val))}


def _load() -> tuple[Tensor, Tensor]:
    """Float32[image, 1, 8, 8] with values 0 … 1, Int64[image]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("scikit-learn is missing", where="digits", do="run: pip install explaind-ledger[digits]") from error
    bunch = load_digits()
    return torch.as_tensor(bunch.images / WHITE, dtype=torch.float32).unsqueeze(1), torch.as_tensor(bunch.target, dtype=torch.int64)
