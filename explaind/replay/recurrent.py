"""Recurrent layers written out, step by step: vmap has no rule for those of torch, which make all steps in one call."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

State = tuple[Tensor, ...]
"""h [batch, hidden]; of an LSTM with c [batch, cell]."""
Cell = Callable[[Tensor, State, Sequence[Tensor]], State]
"""(W_ih x + b_ih, state, W_hh, …) -> the next state."""


def _lstm(given: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    i, f, g, o = (given + F.linear(state[0], *weights[:2])).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (F.linear(h, weights[2]) if len(weights) > 2 else h), c


def _gru(given: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    (r, z, n), (own_r, own_z, own_n) = given.chunk(3, -1), F.linear(state[0], *weights[:2]).chunk(3, -1)
    z = (z + own_z).sigmoid()
    return ((1 - z) * (n + (r + own_r).sigmoid() * own_n).tanh() + z * state[0],)


def _elman(activation: Callable[[Tensor], Tensor]) -> Cell:
    return lambda given, state, weights: (activation(given + F.linear(state[0], *weights[:2])),)


CELLS: Mapping[Any, Cell] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: _elman(torch.tanh),
    torch.rnn_relu: _elman(torch.relu),
}


class WrittenOut(TorchFunctionMode):
    """Where a transform of torch.func asks. Packed sequences, and dropout between layers, stay torch's own."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        transformed = function in CELLS and torch._C._functorch.peek_interpreter_stack() is not None
        if not transformed or kwargs or isinstance(args[2], Tensor) or (args[6] and args[5] > 0):
            return function(*args, **(kwargs or {}))
        return _layers(CELLS[function], *args)


def _layers(
    cell: Cell,
    x: Tensor,
    start: Tensor | State,
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    both_ways: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """What torch.lstm and its like return: outputs, and the last states of every layer and direction."""
    states = (start,) if isinstance(start, Tensor) else tuple(start)
    x = x.transpose(0, 1) if batch_first else x
    each = len(weights) // (layers * (2 if both_ways else 1))
    ends = list[State]()
    for _ in range(layers):
        outputs = []
        for backwards in (False, True) if both_ways else (False,):
            own: list[Any] = list(weights[len(ends) * each : (len(ends) + 1) * each])
            ih, hh, *rest = own if biases else [*own[:2], None, None, *own[2:]]
            state, found = tuple(s[len(ends)] for s in states), list[Tensor]()
            given = F.linear(x, ih, rest[0]).unbind(0)
            for one in reversed(given) if backwards else given:
                state = cell(one, state, [hh, *rest[1:]])
                found.append(state[0])
            outputs.append(torch.stack(found[::-1] if backwards else found))
            ends.append(state)
        x = torch.cat(outputs, -1)
    return (x.transpose(0, 1) if batch_first else x), *(torch.stack(of) for of in zip(*ends, strict=True))
