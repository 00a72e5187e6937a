"""Properties of the autograd graph of a model's outputs, and products with their Jacobian."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from alignreg import estimators

# Operations that torch differentiates only once, or wrongly a second time, by the names of their nodes.
_ONCE = (
    *("ScaledDotProductE", "ScaledDotProductF", "ScaledDotProductC", "CudnnRnn", "MkldnnRnn", "MiopenRnn"),
    *("ThnnFusedLstm", "ThnnFusedGru", "CompiledFunction", "WeightNorm", "FusedRmsNorm", "MaskedSoftmax"),
    *("Hardsigmoid", "MultiMarginLoss", "MultilabelMarginLoss", "CtcLoss", "CdistBackward", "PdistBackward"),
    *("EmbeddingBag", "SegmentReduce", "SparseSoftmax", "SparseLogSoftmax", "SparseSum", "SparseMmReduce"),
    *("FakeQuantizeLearnable", "Mkldnn"),
)
# Operations whose second derivatives are NaN where their result is zero.
_AT_ZERO = ("LinalgVectorNorm", "NormBackward", "Std", "EuclideanDist")
# Normalizations pass their statistics to the backward pass as constants, so that the derivative of a vectorized
# backward pass is wrong. Scripted modules hide their operations.
_CONSTANTS = ("NativeLayerNorm", "NativeGroupNorm", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")
_HIDDEN = "DifferentiableGraphBackward"
# The code of functions marked as once_differentiable, which autograd silently treats as linear for constant gradients.
_MARKED = once_differentiable(lambda _: None).__code__
Nodes = Sequence[Any]
"""The nodes of a graph, as returned by :func:`nodes`."""
# The products in linear layers: the position of the weight among the factors, and the name of the other saved factor.
_MATMULS = {"AddmmBackward0": (2, "_saved_mat1"), "MmBackward0": (1, "_saved_self")}


def twice_differentiable(y: Tensor) -> bool:
    """Return whether y has a graph without kernels that are known to be differentiable only once."""
    return y.requires_grad and not any(_once(node) or _vanishes(node) for node in nodes(y))


def require_twice_differentiable(nodes: Nodes, sources: Iterable[Tensor]) -> None:
    """Raise a ``RuntimeError`` if a kernel between the sources and the outputs is differentiable only once."""
    once = [node for node in nodes if _once(node)]
    if not once:
        return
    users: dict[Any, list[Any]] = {}
    for node in nodes:
        for following, _ in node.next_functions:
            users.setdefault(following, []).append(node)
    waiting = [get_gradient_edge(source).node for source in sources]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node in once:
            raise once_only(node.name())
        new = [user for user in users.get(node, []) if user not in seen]
        seen.update(new)
        waiting += new


def require_recomputable(nodes: Nodes) -> None:
    """Raise a ``ValueError`` if modules are checkpointed with ``use_reentrant=True``."""
    if any(node.name() == "CheckpointFunctionBackward" for node in nodes):
        raise ValueError(
            "the model: expected activation checkpointing with use_reentrant=False, got use_reentrant=True, which "
            "gives no gradients with respect to chosen parameters. Pass use_reentrant=False to checkpoint()."
        )


def gradients(value: Tensor, leaves: Sequence[Tensor], **options: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of a value that depends on gradients, by :func:`torch.autograd.grad`.

    Raises:
        RuntimeError: if an operation is differentiable only once; the message names the operation.
    """
    try:
        return torch.autograd.grad(value, leaves, **options)
    except RuntimeError as error:  # includes NotImplementedError
        pattern = r"derivative for '?(?:aten::)?(\w+)'? is not implemented|(once_differentiable)"
        if match := re.search(pattern, str(error)):
            raise once_only(match[1] or "a custom autograd function") from error
        raise


def once_only(name: str) -> RuntimeError:
    """Return the error for an operation that is differentiable only once, given the name of its node."""
    operation = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", re.sub(r"_?[bB]ackward\d*$", "", name)).lower().strip("_")
    return RuntimeError(
        f"the model: expected operations that torch can differentiate twice, got {operation}. Write it with others, "
        "exclude it from forward_fn, or select parameters after it. Metrics with method='exact' and products without "
        "create_graph need only a first derivative."
    )


def vectorizes(nodes: Nodes) -> bool:
    """Return whether a vectorized backward pass can be differentiated: it has no normalizations in fused kernels."""
    return not any(node.name().startswith(_CONSTANTS) or _HIDDEN in node.name() for node in nodes)


def dtypes(nodes: Nodes) -> set[torch.dtype]:
    """Return the dtypes of all tensors in the graph, including those not saved for the backward pass."""
    return {meta.dtype for node in nodes for meta in getattr(node, "_input_metadata", ())}


def _once(node: Any) -> bool:
    sparse = node.name().startswith("EmbeddingBackward") and getattr(node, "_saved_sparse", False)
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return bool(node.name().startswith(_ONCE) or sparse or getattr(backward, "__code__", None) is _MARKED)


def _vanishes(node: Any) -> bool:
    if not node.name().startswith(_AT_ZERO):
        return False
    result = getattr(node, "_saved_result", None)
    result = getattr(node, "_saved_result0", None) if result is None else result
    return result is None or not bool(result.all())


def leaves_of(nodes: Nodes) -> list[Tensor]:
    """Return the leaves of a graph, which are mostly parameters."""
    return [node.variable for node in nodes if hasattr(node, "variable")]


def sources(y: Tensor, params: Mapping[str, Tensor]) -> tuple[set[str], list[Tensor]]:
    """Return the names of the ``params`` that y depends on, and the leaves that it depends on by other paths."""
    places = {get_gradient_edge(p).node: name for name, p in params.items()}
    used, elsewhere = set(), []
    for node in nodes(y, stop=places):
        if node in places:
            used.add(places[node])
        elif hasattr(node, "variable"):
            elsewhere.append(node.variable)
    return used, elsewhere


def pull(y: Tensor, params: Mapping[str, Tensor], cotangents: Tensor, *, create_graph: bool) -> dict[str, Tensor]:
    """Return Φᵀω ``(m, *shape)`` by parameter name for cotangents ``(m, n, c)``, from the graph of the outputs y.

    The graph is kept.
    """
    own = list(params.values())
    columns = _pull(y, own, own, cotangents, create_graph=create_graph)
    return dict(zip(params, columns, strict=True))


def grams(y: Tensor, params: Mapping[str, Tensor], cotangents: Tensor, *, create_graph: bool) -> dict[str, Tensor]:
    """Return ⟨Φᵀω_a, Φᵀω_b⟩ ``(m, m)`` by parameter name, like :func:`pull`.

    For a weight that is applied to vectors x_p, Φᵀω = Σ_p d_p x_pᵀ with d_p the gradient of the result, so that the
    products are Σ_pq (x_p·x_q)(d_p·d'_q). For few vectors, such as the examples of an MLP, this is far less work.
    """
    products = {name: one for name, one in _matmuls(y, params).items() if one.is_short(len(cotangents))}
    others = [name for name in params if name not in products]
    sources: list[Tensor | GradientEdge] = [params[name] for name in others]
    sources += [one.output for one in products.values()]
    like = [*(params[name] for name in others), *(one.inputs.new_empty(one.output_shape) for one in products.values())]
    columns = _pull(y, sources, like, cotangents, create_graph=create_graph)
    grams = {name: estimators.inner_products(column) for name, column in zip(others, columns, strict=False)}
    for (name, one), d in zip(products.items(), columns[len(others) :], strict=True):
        grams[name] = one.gram(d)
    return {name: grams[name] for name in params}


def _pull(
    y: Tensor,
    sources: Sequence[Tensor | GradientEdge],
    like: Sequence[Tensor],
    cotangents: Tensor,
    *,
    create_graph: bool,
) -> list[Tensor]:
    # One backward pass at a time: a vectorized pass with its gradient needs more memory and is slower on a CPU, except
    # for small MLPs.
    if cotangents.ndim != 3 or cotangents.shape[1:] != y.shape:
        n, c = y.shape
        raise ValueError(f"cotangents: expected (m, n, c) = (m, {n}, {c}), got {tuple(cotangents.shape)}.")
    passes = [
        torch.autograd.grad(
            y,
            sources,  # type: ignore[arg-type]  # a mixture of tensors and edges is allowed
            cotangent.to(y),
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
        for cotangent in cotangents
    ]
    if not passes:
        return [tensor.new_empty(0, *tensor.shape) for tensor in like]
    columns = [list(column) for column in zip(*passes, strict=True)]
    passes.clear()  # so that memory is freed parameter by parameter, after stacking
    return [
        torch.stack([torch.zeros_like(tensor) if g is None else g.to_dense() for g in columns.pop(0)])
        for tensor in like
    ]


class _MatMul(NamedTuple):
    """The only product with a weight in a graph."""

    inputs: Tensor
    """The vectors x ``(N, in)`` that are multiplied with the weight."""
    output: GradientEdge
    output_shape: torch.Size

    def is_short(self, m: int) -> bool:
        """Return whether :meth:`gram` needs fewer multiplications than the m gradients and their products."""
        n, width = self.inputs.shape
        out = self.output_shape[1]
        return n * (n * width + m * n * out + m * m * out) < m * width * out * (n + m)

    def gram(self, d: Tensor) -> Tensor:
        """Return Σ_pq (x_p·x_q)(d_ap·d_bq) for gradients d ``(m, N, out)``."""
        dtype = torch.promote_types(d.dtype, torch.float32)
        x, d = self.inputs.to(dtype), d.to(dtype)
        return d.flatten(1) @ ((x @ x.T) @ d).flatten(1).T


def _matmuls(y: Tensor, params: Mapping[str, Tensor]) -> dict[str, _MatMul]:
    """Return the products of the parameters that the graph uses as the weight of one product and nowhere else."""
    users: dict[Any, list[tuple[Any, int]]] = {}
    for node in nodes(y):
        for place, (following, _) in enumerate(node.next_functions):
            users.setdefault(following, []).append((node, place))

    def only_user(node: Any) -> tuple[Any, int]:
        own = users.get(node, [])
        return own[0] if len(own) == 1 else (None, 0)

    products = {}
    for name, p in params.items():
        user, place = only_user(get_gradient_edge(p).node)
        out = 1
        if user is not None and user.name() == "TBackward0":
            user, place = only_user(user)
            out = 0
        expected, saved = _MATMULS.get(user.name() if user is not None else "", (None, ""))
        if place != expected or getattr(user, "_saved_alpha", 1) != 1:
            continue
        x = getattr(user, saved)
        if x.layout == torch.strided and not x.is_complex():
            products[name] = _MatMul(x, GradientEdge(user, 0), torch.Size((len(x), p.shape[out])))
    return products


def nodes(y: Tensor, stop: Container[Any] = ()) -> Nodes:
    """Return the nodes of the graph of y, without the nodes behind those of ``stop``."""
    seen = dict.fromkeys([y.grad_fn])
    waiting = [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in stop:
            for following, _ in node.next_functions:
                if following not in seen:
                    seen[following] = None
                    waiting.append(following)
    return [node for node in seen if node is not None]
