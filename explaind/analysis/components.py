"""What of a network can be taken out at once: its parameters as components, at five levels."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from torch import nn

from explaind.errors import RequestError
from explaind.store.manifest import Layer

LEVELS = ("param", "neuron", "head", "module", "tensor")
LISTED = re.compile(r"((?:.*\.)?heads\.\d+)\..+")
"""A parameter of a head that is a module of its own, in a list called heads."""
ROWS = ("query", "key", "value")
"""Linear maps whose rows, in equal parts, are the heads of an attention with ``head_count``; its ``mix`` has them in its columns."""
OUTSIDE = -1


@dataclass(frozen=True, eq=False)
class Components:
    """The parameters of a model, dealt to components.

    of     int [param]: the component of each parameter, counted from 0 in the order of the layers; −1: of none, and never taken out
    names  of the components
    """

    of: np.ndarray
    names: tuple[str, ...]


def components(layers: Sequence[Layer], level: str, model: nn.Module | None = None) -> Components:
    """All components of a level.

    param   each alone
    neuron  an output row of a weight (an output channel of a convolution), with its entry of the bias of the same module
    head    of an attention: what is below a module of a list called heads, or a head's share of the projections that all heads share
            (``heads_of``, which needs the model); parameters outside the heads are of no component
    module  all tensors of one module that are its own, not its children's
    tensor  each tensor

    RequestError for another level, and for heads where there are none that are known.
    """
    if level not in LEVELS:
        raise RequestError("unknown level of components", expected=", ".join(LEVELS), got=repr(level), do="name one of these")
    heads = heads_of(layers, model) if level == "head" else {}
    number: dict[str, int] = {}
    found = [np.zeros(0, np.int64)]
    for layer in layers:
        names, local = heads.get(layer.name, ([], np.full(layer.size, OUTSIDE))) if level == "head" else _inside(layer, level)
        places = np.array([*(number.setdefault(name, len(number)) for name in names), OUTSIDE])
        found.append(places[local])  # −1 is the last place
    return Components(np.concatenate(found), tuple(number))


def _inside(layer: Layer, level: str) -> tuple[list[str], np.ndarray]:
    """Of one layer: (names of its components, which of them each entry is of: int [param])."""
    module = layer.name.rpartition(".")[0] or layer.name
    if level == "param":
        return [f"{layer.name}[{i}]" for i in range(layer.size)], np.arange(layer.size)
    if level == "neuron":
        rows = layer.shape[0] if layer.shape else 1
        return [f"{module}[{i}]" for i in range(rows)], np.arange(layer.size) * rows // max(layer.size, 1)
    return [module if level == "module" else layer.name], np.zeros(layer.size, np.int64)


def heads_of(layers: Sequence[Layer], model: nn.Module | None) -> dict[str, tuple[list[str], np.ndarray]]:
    """The heads of all attentions: {layer: (names of its heads, which of them each entry is of: int [param])}.

    What is below a module of a list called heads is that head. torch.nn.MultiheadAttention, and any module with ``head_count`` and the
    linear maps query, key, value and mix, hold all heads side by side: a head has its rows of what makes queries, keys and values, and
    its columns of what leads out; the bias behind that is of no head. Without these a head's output is exactly zero.
    """
    found: dict[str, tuple[list[str], np.ndarray]] = {}
    sliced = {} if model is None else {name: (count, axis, module) for module, count, name, axis in _sliced(model)}
    for layer in layers:
        if listed := LISTED.fullmatch(layer.name):
            found[layer.name] = [listed[1]], np.zeros(layer.size, np.int64)
        elif layer.name in sliced:
            count, axis, module = sliced[layer.name]
            names = [f"{module}.heads[{i}]".removeprefix(".") for i in range(count)]
            found[layer.name] = names, _dealt(layer.shape, axis, count, 3 if layer.name.rpartition(".")[2].startswith("in_proj") else 1)
    if not found:
        raise RequestError(
            "the model has no attention heads that could be told apart",
            where="level head",
            expected="a list of modules called heads, torch.nn.MultiheadAttention, or a module with head_count, query, key, value and mix",
            got=", ".join(dict.fromkeys(layer.name.partition(".")[0] for layer in layers)),
            do=f"name other levels: {', '.join(level for level in LEVELS if level != 'head')}",
        )
    return found


def _sliced(model: nn.Module) -> Iterator[tuple[str, int, str, int]]:
    """Parameters that hold all heads of an attention: (name of the module, number of heads, name of the parameter, axis of the heads)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            count, inner = module.num_heads, dict.fromkeys(("in_proj_weight", "in_proj_bias"), 0)
            inner |= {f"{part}_proj_weight": 0 for part in "qkv"} | {"bias_k": -1, "bias_v": -1, "out_proj.weight": 1}
        elif isinstance(count := getattr(module, "head_count", None), int) and all(hasattr(module, part) for part in (*ROWS, "mix")):
            inner = {f"{part}.{kind}": 0 for part in ROWS for kind in ("weight", "bias")} | {"mix.weight": 1}
        else:
            continue
        for key, axis in inner.items():
            yield name, count, f"{name}.{key}".removeprefix("."), axis


def _dealt(shape: Sequence[int], axis: int, count: int, stacked: int) -> np.ndarray:
    """The head of each entry, where one axis holds `stacked` times all heads in equal parts: int [param]."""
    width = shape[axis]
    along = np.arange(width) % (width // stacked) // (width // stacked // count)
    place = [1] * len(shape)
    place[axis] = width
    dealt: np.ndarray = np.broadcast_to(along.reshape(place), shape).reshape(prod(shape))
    return dealt
