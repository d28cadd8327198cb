"""What an optimizer must be handed to make the steps of a training once more: its state and its parameter groups, as plain arrays.

state   uint32 words: how many, bytes of a header, the header (JSON: by parameter and key, a dtype, a shape and whose device it is on, or a
        plain number), then the bytes of every tensor, each filled up to whole words
groups  bytes of JSON: one entry a group, its parameters by their place among the recorded ones; no pickle anywhere
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from explaind.errors import RecordError, ReplayError

WORD = 4
PLAIN = (bool, int, float, str, type(None))


def packed_state(optimizer: Optimizer, params: Sequence[Tensor]) -> np.ndarray:
    """The state of an optimizer of these parameters: uint32 [word]; RecordError for what is neither a tensor nor a number."""
    places = {id(p): i for i, p in enumerate(params)}
    header, parts = dict[str, dict[str, Any]](), list[bytes]()
    if any(id(p) not in places for p in optimizer.state):
        raise RecordError("the optimizer keeps a state that belongs to no recorded parameter", do="record without thin=")
    for p, state in sorted(optimizer.state.items(), key=lambda item: places[id(item[0])]):  # a loaded checkpoint has an order of its own
        told = header[str(places[id(p)])] = {}
        for key, value in sorted(state.items()):
            if isinstance(value, Tensor):
                told[key] = [str(value.dtype).removeprefix("torch."), list(value.shape), value.device == p.device]
                data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                parts.append(data + bytes(-len(data) % WORD))
            else:
                told[key] = _plain(value, f"the optimizer's state {key!r}")
    text = json.dumps(header).encode()
    head = np.array([0, len(text)], dtype=np.uint32).tobytes() + text + bytes(-len(text) % WORD)
    words = np.frombuffer(head + b"".join(parts), dtype=np.uint32).copy()
    words[0] = len(words)
    return words


def put_state(words: np.ndarray, optimizer: Optimizer, params: Sequence[Tensor]) -> None:
    """Give an optimizer of these parameters a packed state; ReplayError where it is damaged."""
    try:
        text = words[2:].tobytes()
        at = int(words[1])
        header, at = json.loads(text[:at]), at + -at % WORD
        optimizer.state.clear()
        for place, told in header.items():
            p = params[int(place)]
            for key, value in told.items():
                if isinstance(value, list):
                    tensor, at = _tensor(text, at, value[0], value[1])
                    optimizer.state[p][key] = tensor.to(p.device) if value[2] else tensor
                else:
                    optimizer.state[p][key] = value
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ReplayError(
            "a stored state of the optimizer cannot be read", got=repr(error), do="explaind verify says whether the run is damaged"
        ) from error


def _tensor(text: bytes, at: int, dtype: str, shape: list[int]) -> tuple[Tensor, int]:
    kind: Any = getattr(torch, dtype)
    empty = torch.empty(shape, dtype=kind)
    size = empty.numel() * empty.element_size()
    if size:
        empty = torch.frombuffer(bytearray(text[at : at + size]), dtype=kind).reshape(shape)
    return empty, at + size + -size % WORD


def packed_groups(optimizer: Optimizer, params: Sequence[Tensor]) -> np.ndarray:
    """The parameter groups as they stand: uint8 [byte]; RecordError for an option that is not a number, a word or a tuple of them."""
    places = {id(p): i for i, p in enumerate(params)}
    told = [
        {key: [places[id(p)] for p in value] if key == "params" else _option(value, key) for key, value in sorted(group.items())}
        for group in optimizer.param_groups
    ]
    return np.frombuffer(json.dumps(told).encode(), dtype=np.uint8)


def groups_of(packed: np.ndarray, params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Parameter groups of these parameters; ReplayError where they are damaged."""
    try:
        told = json.loads(packed.tobytes())
        return [{k: [params[i] for i in v] if k == "params" else _given(v) for k, v in group.items()} for group in told]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ReplayError(
            "stored parameter groups cannot be read", got=repr(error), do="explaind verify says whether the run is damaged"
        ) from error


def _plain(value: Any, what: str) -> Any:
    if not isinstance(value, PLAIN):
        raise RecordError(f"{what} is neither a tensor nor a number", got=type(value).__name__, do="record without thin=")
    return value


def _option(value: Any, key: str) -> Any:
    """JSON of an option: tuples and tensors of one number are told apart from what they hold."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape), value.item()]}
    if isinstance(value, tuple | list):
        return {type(value).__name__ if isinstance(value, list) else "tuple": [_option(item, key) for item in value]}
    return _plain(value, f"the option {key!r} of a parameter group")


def _given(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        dtype, shape, number = held
        return torch.full(shape, number, dtype=getattr(torch, dtype))
    return (tuple if kind == "tuple" else list)(_given(item) for item in held)
