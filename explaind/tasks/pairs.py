"""Two classes of images that are easily taken for each other: by default shirt and T-shirt of Fashion-MNIST.

Sources: Xiao, Rasul, Vollgraf, "Fashion-MNIST" (arXiv 1708.07747), as the Debian package dataset-fashion-mnist installs it; any other
image set of the same files, or in an .npz file. Network "resnet9" after Page, "How to Train Your ResNet" (2018), without its norms.
"""

import gzip
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from explaind.errors import ConfigError
from explaind.tasks.measures import classification
from explaind.tasks.task import Batch, Measure

Activation = Literal["relu", "gelu", "tanh"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian puts it."""
FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
IDX = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "val": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
NPZ = {"train": ("x_train", "y_train"), "val": ("x_val", "y_val")}
LARGEST = 1 << 32
"""Bytes of the images of a split."""
WIDTHS = {"resnet9": (64, 128, 256, 512), "cnn": (16, 32), "mlp": (128,)}
"""What the widths of a network are where none are given: channels of the convolutions, or units of the hidden layers."""
LEAST_SIDE = {"resnet9": 8, "cnn": 4, "mlp": 1}
"""Pixels that are left to pool, a factor of 2 for every pool."""


class Residual(nn.Module):
    """x + two convolutions of it."""

    def __init__(self, width: int, activation: Activation) -> None:
        super().__init__()
        self.first, self.second = (convolution(width, width, activation) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width, row, column], twice."""
        return x + self.second(self.first(x))


class Largest(nn.Module):
    """The largest value of every channel."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channel, row, column] -> [batch, channel]."""
        return x.amax((-2, -1))


def convolution(inputs: int, outputs: int, activation: Activation) -> nn.Sequential:
    """3 × 3 and an activation; no norm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), ACTIVATIONS[activation]())


def resnet9(shape: tuple[int, ...], classes: int, widths: Sequence[int], activation: Activation) -> nn.Sequential:
    """Float[batch, *shape] -> logits [batch, class], through eight convolutions and one linear map."""
    first, second, third, fourth = widths
    model = nn.Sequential()
    model.add_module("prepare", convolution(shape[0], first, activation))
    model.add_module("block1", nn.Sequential(convolution(first, second, activation), nn.MaxPool2d(2), Residual(second, activation)))
    model.add_module("block2", nn.Sequential(convolution(second, third, activation), nn.MaxPool2d(2)))
    model.add_module("block3", nn.Sequential(convolution(third, fourth, activation), nn.MaxPool2d(2), Residual(fourth, activation)))
    model.add_module("largest", Largest())
    model.add_module("output", nn.Linear(fourth, classes))
    return model


def cnn(shape: tuple[int, ...], classes: int, widths: Sequence[int], activation: Activation) -> nn.Sequential:
    """Float[batch, *shape] -> logits [batch, class]; two convolutions, pooled by means, which are smooth."""
    model, inputs = nn.Sequential(), shape[0]
    for i, width in enumerate(widths, start=1):
        model.add_module(f"block{i}", nn.Sequential(convolution(inputs, width, activation), nn.AvgPool2d(2)))
        inputs = width
    model.add_module("flat", nn.Flatten())
    model.add_module("output", nn.Linear(inputs * (shape[1] // 4) * (shape[2] // 4), classes))
    return model


def mlp(shape: tuple[int, ...], classes: int, widths: Sequence[int], activation: Activation) -> nn.Sequential:
    """Float[batch, *shape] -> logits [batch, class], through hidden layers of these widths."""
    model, inputs = nn.Sequential(), int(np.prod(shape))
    model.add_module("flat", nn.Flatten())
    for i, width in enumerate(widths, start=1):
        model.add_module(f"hidden{i}", nn.Sequential(nn.Linear(inputs, width), ACTIVATIONS[activation]()))
        inputs = width
    model.add_module("output", nn.Linear(inputs, classes))
    return model


NETWORKS: dict[str, Callable[[tuple[int, ...], int, Sequence[int], Activation], nn.Sequential]] = {
    "resnet9": resnet9,
    "cnn": cnn,
    "mlp": mlp,
}


@dataclass(frozen=True)
class Pairs:
    """Which of two similar classes is it?

    source   "fashion"; a folder with the four files of Fashion-MNIST or of a set like it; or an .npz with x_train, y_train, x_val, y_val
    classes  two numbers of the source's classes, or more; they become classes 0, 1, … in this order
    train_examples, val_examples   how many, drawn by ``split_seed``; by default all of these classes. The two never mix.
    widths   of the network's layers, see ``WIDTHS``, whose values they have by default
    """

    source: str = "fashion"
    classes: tuple[int, ...] = (0, 6)
    train_examples: int | None = None
    val_examples: int | None = None
    split_seed: int = 0
    network: Literal["resnet9", "cnn", "mlp"] = "resnet9"
    widths: tuple[int, ...] = ()
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        for option in ("network", "activation"):
            choices = get_args(get_type_hints(type(self))[option])
            if getattr(self, option) not in choices:
                raise ConfigError("unknown choice", where=f"pairs.{option}", expected=" | ".join(choices), got=repr(getattr(self, option)))
        for option in ("train_examples", "val_examples"):
            if getattr(self, option) is not None and getattr(self, option) < 1:
                raise ConfigError("too small", where=f"pairs.{option}", expected="at least 1", got=getattr(self, option))
        if len(set(self.classes)) < 2 or len(set(self.classes)) < len(self.classes):
            raise ConfigError("these are no classes to tell apart", where="pairs.classes", expected="two different", got=self.classes)
        layers = len(WIDTHS[self.network])
        if self.widths and (min(self.widths) < 1 or (self.network != "mlp" and len(self.widths) != layers)):
            expected = f"{'any number of' if self.network == 'mlp' else layers} widths of at least 1"
            raise ConfigError("these widths make no network", where="pairs.widths", expected=expected, got=self.widths)

    def model(self) -> nn.Module:
        """A fresh network of the option ``network``, in float32; its last layer is called ``output``."""
        shape = tuple(self.data("train").tensors[0].shape[1:])
        if min(shape[1:]) < LEAST_SIDE[self.network]:
            expected = f"at least {LEAST_SIDE[self.network]} pixels a side for {self.network}"
            raise ConfigError(
                "the images are too small", where="pairs.network", expected=expected, got=shape[1:], do="take another network"
            )
        return NETWORKS[self.network](shape, len(self.classes), self.widths or WIDTHS[self.network], self.activation)

    def data(self, split: str) -> TensorDataset:
        """Examples (Float[channel, row, column], Int[]): the image and its class.

        Pixels are less the mean and over the deviation of the training examples, by channel. ConfigError where the files are not there.
        """
        if split not in NPZ:
            raise ConfigError("unknown split", where="pairs", expected=" or ".join(NPZ), got=repr(split))
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
        """Such as "shirt", or "class 3" where the source names none."""
        return self.outputs()[int(self.data(split)[index][1])]

    def outputs(self) -> Sequence[str]:
        """The classes, in the order of the option."""
        named = self.source == "fashion" and all(0 <= c < len(FASHION_CLASSES) for c in self.classes)
        return tuple(FASHION_CLASSES[c] if named else f"class {c}" for c in self.classes)

    def layer_groups(self) -> Mapping[str, Sequence[str]]:
        """The blocks of the network, from input to output."""
        return {name: [f"{name}.*"] for name, block in self.model().named_children() if next(block.parameters(), None) is not None}

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0])

    @cached_property
    def _splits(self) -> dict[str, TensorDataset]:
        generator = torch.Generator().manual_seed(self.split_seed)
        counts = {"train": self.train_examples, "val": self.val_examples}
        chosen = {split: self._chosen(split, count, generator) for split, count in counts.items()}
        deviation, mean = torch.std_mean(chosen["train"][0], (0, 2, 3), correction=0, keepdim=True)
        scale = torch.where(deviation > 0, deviation, 1.0)  # of a channel that is the same everywhere
        return {split: TensorDataset((images - mean) / scale, labels) for split, (images, labels) in chosen.items()}

    def _chosen(self, split: str, count: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Float[example, channel, row, column] with values 0 … 1, Int[example], in the order drawn by the generator."""
        images, labels = read(self.source, split)
        there = np.flatnonzero(np.isin(labels, self.classes))
        absent = [c for c in self.classes if c not in labels]
        if absent or (count or 0) > len(there):
            expected = f"class {absent[0]}" if absent else f"at most {len(there)} examples of {split}"
            got = f"classes {np.unique(labels).tolist()}" if absent else count
            raise ConfigError("the source has too little", where=f"pairs, {self.source}", expected=expected, got=got, do="ask for less")
        chosen = there[torch.randperm(len(there), generator=generator)[:count].numpy()]
        place = {c: i for i, c in enumerate(self.classes)}
        return pictures(images[chosen], self.source), torch.tensor([place[int(c)] for c in labels[chosen]])


def pictures(images: np.ndarray, source: str) -> Tensor:
    """Bytes or floats [image, row, column], or with an axis of 1 or 3 channels before or after these -> Float[image, channel, row, column].

    Bytes become 0 … 1; floats stay as they are.
    """
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or not (images.dtype == np.uint8 or images.dtype.kind == "f"):
        expected = "uint8 or float [image, row, column] with a channel axis or without"
        raise ConfigError("these are no images", where=f"pairs, {source}", expected=expected, got=f"{images.dtype} {images.shape}")
    values = torch.from_numpy(np.ascontiguousarray(images)).to(torch.float32)
    return values / 255 if images.dtype == np.uint8 else values


def read(source: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [image, …] and labels [image] of a split, as they are stored; ConfigError where they are not, or damaged."""
    path = FASHION if source == "fashion" else Path(source)
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as stored:
                images, labels = (npy(stored, name) for name in NPZ[split])
        else:
            images, labels = (idx(path / name) for name in IDX[split])
    except OSError as error:
        do = "run: apt-get install dataset-fashion-mnist" if source == "fashion" else "check task.source"
        got = f"{type(error).__name__}: {error.strerror or error}"
        raise ConfigError("the images cannot be read", where=f"pairs, {path}", got=got, do=do) from error
    except (ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ConfigError(
            "the images are damaged, or something else", where=f"pairs, {path}", got=error, do="get the file again"
        ) from error
    labels = labels.reshape(-1)
    if len(images) != len(labels):
        got = f"{len(images)} images, {len(labels)} labels"
        raise ConfigError("images and labels differ in number", where=f"pairs, {path}", got=got, do="get the files again")
    return images, labels


def idx(path: Path) -> np.ndarray:
    """A gzipped IDX file: 0, 0, 8 for bytes, the number of axes, the length of each (4 bytes, big-endian), then the data, row-major."""
    with gzip.open(path) as file:
        head = file.read(4)
        if len(head) < 4 or head[:3] != b"\x00\x00\x08":
            raise ValueError(f"{path.name} is no IDX file of bytes")
        shape = np.frombuffer(file.read(4 * head[3]), dtype=">u4", count=head[3]).tolist()
        values = file.read(held(prod(shape), path.name))
        if file.read(1):  # which looks at gzip's checksum, too
            raise ValueError(f"{path.name} is longer than it says")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def npy(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of an .npz file; no object is read."""
    with archive.open(f"{name}.npy") as file:
        first = np.lib.format.read_magic(file) == (1, 0)
        shape, _, dtype = (np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0)(file)
        held(prod(shape) * dtype.itemsize, name)
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def held(size: int, name: str) -> int:
    """So many bytes; ValueError where a file claims more than is read into memory."""
    if size > LARGEST:
        raise ValueError(f"{name} says that it has {size} bytes, of at most {LARGEST}")
    return size
