"""The table of torch functions with a rule. A new rule is a function, and a row here and in the table of the tests."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from alignreg.tangents.kernel.calls import Call
from alignreg.tangents.kernel.rules.embedding import embedding
from alignreg.tangents.kernel.rules.linear import convolution, linear
from alignreg.tangents.kernel.rules.normalization import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from alignreg.tangents.kernel.rules.prelu import prelu
from alignreg.tangents.primitives import normalization

RULES: dict[Callable[..., Any], Callable[..., Call | None]] = {
    F.linear: linear,
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    F.batch_norm: batch_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.embedding: embedding,
    F.prelu: prelu,
}
"""Rules, called with the arguments of the function; they return ``None`` where they do not hold."""

SIGNATURES = {function: inspect.signature(rule) for function, rule in RULES.items()}


def _opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a torch function that makes the calls inside it visible to modes."""
    assert isinstance(function, types.FunctionType)
    scope = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


QUICKER: dict[Callable[..., Any], Callable[..., Any]] = {F.batch_norm: normalization.batch_norm}
"""Replacements that are faster to differentiate."""

COMPOSITES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: _opened(F.multi_head_attention_forward),
}
"""Functions that pass their parameters to functions with rules."""
