"""Recurrent layers, in terms of linear maps of inputs and states at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]
"""The output h ``(n, ·)`` and, for an LSTM, the cell c."""
Step = Callable[[Tensor, Tensor, State], State]
"""A function that maps ``(W x + b, U h + b', state)`` to the next state."""


def _rnn_tanh(x: Tensor, h: Tensor, state: State) -> State:  # noqa: ARG001
    return (torch.tanh(x + h),)


def _rnn_relu(x: Tensor, h: Tensor, state: State) -> State:  # noqa: ARG001
    return (torch.relu(x + h),)


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (reset, update, new), (of_reset, of_update, of_new) = x.chunk(3, -1), h.chunk(3, -1)
    z = torch.sigmoid(update + of_update)
    candidate = torch.tanh(new + torch.sigmoid(reset + of_reset) * of_new)
    return (candidate + z * (state[0] - candidate),)


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _cell(step: Step) -> Callable[..., Any]:
    def cell(
        input: Tensor,  # noqa: A002 - torch's name
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
        state = step(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        return state if len(state) > 1 else state[0]

    return cell


def _layers(step: Step) -> Callable[..., Any]:
    def layers(*args: Any) -> Any:
        """Compute the layers; for packed sequences, the second argument is their sizes."""
        packed = isinstance(args[3], tuple | list)
        x, *rest = args
        sizes: list[int] | None = rest.pop(0).tolist() if packed else None
        hx, weights, biases, number, dropout, train, both, *first = rest
        batch_first = bool(first and first[0])
        x = x.transpose(0, 1) if batch_first else x
        start = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
        width = len(weights) // (number * (1 + both))
        ends: list[State] = []
        for layer in range(number):
            outputs = []
            for reverse in (False, True)[: 1 + both]:
                k = len(ends)
                own = weights[k * width : (k + 1) * width]
                output, end = _scan(step, x, sizes, own, biases, tuple(s[k] for s in start), reverse=reverse)
                outputs.append(output)
                ends.append(end)
            x = torch.cat(outputs, -1) if both else outputs[0]
            if layer + 1 < number:
                x = F.dropout(x, dropout, train)
        x = x.transpose(0, 1) if batch_first else x
        return x, *(torch.stack(states) for states in zip(*ends, strict=True))

    return layers


def _scan(
    step: Step,
    x: Tensor,
    sizes: list[int] | None,
    weights: Sequence[Tensor],
    biases: bool,
    start: State,
    *,
    reverse: bool,
) -> tuple[Tensor, State]:
    """Return the outputs of one layer in one direction, and its final state."""
    w_ih, w_hh, *more = weights
    b_ih, b_hh = more[:2] if biases else (None, None)
    projection = more[2 * biases :]  # an LSTM with proj_size has one
    inputs = F.linear(x, w_ih, b_ih)
    steps = inputs.unbind(0) if sizes is None else torch.split(inputs, sizes)
    state = tuple(s[: len(steps[-1])] for s in start) if reverse else start
    outputs, done = [], []
    for one in reversed(steps) if reverse else steps:
        now, size = len(state[0]), len(one)
        if size < now:  # some sequences end here
            done.append(tuple(s[size:] for s in state))
            state = tuple(s[:size] for s in state)
        elif size > now:
            state = tuple(torch.cat([s, s0[now:size]]) for s, s0 in zip(state, start, strict=True))
        state = step(one, F.linear(state[0], w_hh, b_hh), state)
        if projection:
            state = (F.linear(state[0], projection[0]), *state[1:])
        outputs.append(state[0])
    outputs = outputs[::-1] if reverse else outputs
    end = tuple(torch.cat(parts) for parts in zip(state, *reversed(done), strict=True)) if done else state
    return torch.stack(outputs) if sizes is None else torch.cat(outputs), end


def _functions() -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    for name, step in (("rnn_tanh", _rnn_tanh), ("rnn_relu", _rnn_relu), ("gru", _gru), ("lstm", _lstm)):
        yield getattr(torch, name), _layers(step)
        yield getattr(torch, f"{name}_cell"), _cell(step)


RECURRENT = dict(_functions())
"""Torch functions of recurrent layers and cells, in terms of linear maps."""
