"""The table of torch functions with a rule. A new rule is a function, and a row here and in the table of the tests."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from alignreg.tangents.kernel.calls import Call
from alignreg.tangents.kernel.rules.broadcast import (
    choice,
    difference,
    expanded,
    joined,
    product,
    quotient,
    repeated,
    total,
)
from alignreg.tangents.kernel.rules.composites import attention, grouped_mm
from alignreg.tangents.kernel.rules.embedding import embedding
from alignreg.tangents.kernel.rules.linear import convolution, linear
from alignreg.tangents.kernel.rules.normalization import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from alignreg.tangents.kernel.rules.prelu import prelu
from alignreg.tangents.kernel.rules.products import addmm, matmul
from alignreg.tangents.kernel.rules.recurrent import RECURRENT
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
    torch.addmm: addmm,
}
"""Rules, called with the arguments of the function; they return ``None`` where they do not hold."""

ARGUMENTS = {addmm: ("mat2", "input")}
"""The names of the weight and the bias, if they are not these."""

EXPANSIONS = (torch.Tensor.expand, torch.Tensor.expand_as, torch.Tensor.broadcast_to, torch.broadcast_to)
ANYWHERE: dict[Callable[..., Any], Callable[..., Call | None]] = {
    **dict.fromkeys((torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.multiply), product),
    **dict.fromkeys((torch.add, torch.Tensor.add), total),
    **dict.fromkeys((torch.sub, torch.subtract, torch.Tensor.sub), difference),
    **dict.fromkeys((torch.div, torch.divide, torch.true_divide, torch.Tensor.div), quotient),
    **dict.fromkeys((torch.Tensor.add_, torch.Tensor.__iadd__), total),
    torch.where: choice,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), joined),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm), matmul),
    **dict.fromkeys(EXPANSIONS, expanded),
    torch.Tensor.repeat: repeated,
}
"""Rules for a parameter at any place among the arguments, as in :mod:`.broadcast`."""

_SIGNATURES = {rule: inspect.signature(rule) for rule in (*RULES.values(), *ANYWHERE.values())}


def given(rule: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call that are its ``"weight"`` and ``"bias"``."""
    bound = _SIGNATURES[rule].bind(*args, **kwargs).arguments
    names = ARGUMENTS.get(rule, ("weight", "bias"))
    return {kind: bound[name] for kind, name in zip(("weight", "bias"), names, strict=True) if name in bound}


def places(rule: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments of a call in the order of the signature, with lists of tensors flattened."""
    bound = _SIGNATURES[rule].bind(None, None, None, *args, **kwargs).arguments
    values = list(bound.values())[3:]
    return [x for value in values for x in (value if isinstance(value, tuple | list) else (value,))]


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
    F.scaled_dot_product_attention: attention,
    **{getattr(torch, name): grouped_mm for name in ("_grouped_mm",) if hasattr(torch, name)},
    **RECURRENT,
}
"""Functions that call those with rules on the parameters they are given, or return ``NotImplemented``."""
