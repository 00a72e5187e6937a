"""What the autograd graph of a model's outputs says, and the products with their Jacobian that it gives."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from alignreg import estimators

# Nodes of kernels that torch differentiates once only, or twice and wrong.
_ONCE = ("ScaledDotProduct", "CudnnRnn", "MkldnnRnn", "CompiledFunction", "WeightNorm")
# The products that linear layers run: which of the factors is the weight, and under what name the other is saved.
_PRODUCTS = {"AddmmBackward0": (2, "_saved_mat1"), "MmBackward0": (1, "_saved_self")}


def twice_differentiable(y: Tensor) -> bool:
    """Say whether y has a graph, without kernels that are known to be differentiated once only."""
    return y.requires_grad and not any(node.name().startswith(_ONCE) for node in _nodes(y))


def leaves_of(value: Tensor) -> list[Tensor]:
    """Return the leaves, parameters mostly, that a value depends on."""
    return [node.variable for node in _nodes(value) if hasattr(node, "variable")]


def sources(y: Tensor, params: Mapping[str, Tensor]) -> tuple[set[str], list[Tensor]]:
    """Return the names of the tensors that y depends on, and the leaves that it depends on past them."""
    places = {get_gradient_edge(p).node: name for name, p in params.items()}
    used, elsewhere = set(), []
    for node in _nodes(y, stop=places):
        if node in places:
            used.add(places[node])
        elif hasattr(node, "variable"):
            elsewhere.append(node.variable)
    return used, elsewhere


def pull(y: Tensor, params: Mapping[str, Tensor], cotangents: Tensor, *, create_graph: bool) -> dict[str, Tensor]:
    """Return Φᵀω by parameter name ``(m, *shape)``, from the graph of the outputs y, which is kept.

    Args:
        y: outputs ``(n, c)``.
        params: what to differentiate with respect to.
        cotangents: Ω ``(m, n, c)``.
        create_graph: make the result differentiable.

    Raises:
        ValueError: if the cotangents do not fit the outputs.
    """
    own = list(params.values())
    columns = _pull(y, own, own, cotangents, create_graph=create_graph)
    return dict(zip(params, columns, strict=True))


def grams(y: Tensor, params: Mapping[str, Tensor], cotangents: Tensor, *, create_graph: bool) -> dict[str, Tensor]:
    """Return ⟨Φᵀω_a, Φᵀω_b⟩ by parameter name ``(m, m)``, from the graph of the outputs y, which is kept.

    Of a weight through which vectors x_p went, Φᵀω = Σ_p d_p x_pᵀ, d_p the gradient of what came out, so that the
    products are Σ_pq (x_p·x_q)(d_p·d'_q). For few vectors, as the examples of an MLP are, that is far less work.

    Args:
        y: outputs ``(n, c)``.
        params: what to differentiate with respect to.
        cotangents: Ω ``(m, n, c)``.
        create_graph: make the result differentiable.

    Raises:
        ValueError: if the cotangents do not fit the outputs.
    """
    products = {name: one for name, one in _products(y, params).items() if one.is_short(len(cotangents))}
    others = [name for name in params if name not in products]
    sources: list[Tensor | GradientEdge] = [params[name] for name in others]
    sources += [one.output for one in products.values()]
    like = [*(params[name] for name in others), *(one.inputs.new_empty(one.output_shape) for one in products.values())]
    columns = _pull(y, sources, like, cotangents, create_graph=create_graph)
    found = {name: estimators.inner_products(column) for name, column in zip(others, columns, strict=False)}
    for (name, one), d in zip(products.items(), columns[len(others) :], strict=True):
        found[name] = one.gram(d)
    return {name: found[name] for name in params}


def _pull(
    y: Tensor,
    sources: Sequence[Tensor | GradientEdge],
    like: Sequence[Tensor],
    cotangents: Tensor,
    *,
    create_graph: bool,
) -> list[Tensor]:
    # One backward pass after the other: a vectorised one, with its gradient, is slower on a CPU but for small MLPs, and
    # takes more memory.
    if cotangents.ndim != 3 or cotangents.shape[1:] != y.shape:
        n, c = y.shape
        raise ValueError(f"cotangents: expected (m, n, c) = (m, {n}, {c}), got {tuple(cotangents.shape)}.")
    passes = [
        torch.autograd.grad(
            y,
            sources,  # type: ignore[arg-type]  # tensors and edges may be mixed
            cotangent.to(y),
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
        for cotangent in cotangents
    ]
    if not passes:
        return [tensor.new_empty(0, *tensor.shape) for tensor in like]
    columns = zip(*passes, strict=True)
    return [
        torch.stack([torch.zeros_like(tensor) if g is None else g for g in column])
        for column, tensor in zip(columns, like, strict=True)
    ]


class _Product(NamedTuple):
    """The one product with a weight that a graph contains."""

    inputs: Tensor
    """The vectors x ``(N, in)`` that went through it."""
    output: GradientEdge
    output_shape: torch.Size

    def is_short(self, m: int) -> bool:
        """Say whether :meth:`gram` takes fewer multiplications than the m gradients of the weight and theirs."""
        n, width = self.inputs.shape
        out = self.output_shape[1]
        return n * (n * width + m * n * out + m * m * out) < m * width * out * (n + m)

    def gram(self, d: Tensor) -> Tensor:
        """Return Σ_pq (x_p·x_q)(d_ap·d_bq) for gradients d ``(m, N, out)``."""
        dtype = torch.promote_types(d.dtype, torch.float32)
        x, d = self.inputs.to(dtype), d.to(dtype)
        return d.flatten(1) @ ((x @ x.T) @ d).flatten(1).T


def _products(y: Tensor, params: Mapping[str, Tensor]) -> dict[str, _Product]:
    """Return the products of those parameters that the graph uses as the weight of one product and nowhere else."""
    users: dict[Any, list[tuple[Any, int]]] = {}
    for node in _nodes(y):
        for place, (following, _) in enumerate(node.next_functions):
            users.setdefault(following, []).append((node, place))

    def only_user(node: Any) -> tuple[Any, int]:
        found = users.get(node, [])
        return found[0] if len(found) == 1 else (None, 0)

    found = {}
    for name, p in params.items():
        user, place = only_user(get_gradient_edge(p).node)
        out = 1
        if user is not None and user.name() == "TBackward0":
            user, place = only_user(user)
            out = 0
        expected, saved = _PRODUCTS.get(user.name() if user is not None else "", (None, ""))
        if place != expected or getattr(user, "_saved_alpha", 1) != 1:
            continue
        x = getattr(user, saved)
        if x.layout == torch.strided and not x.is_complex():
            found[name] = _Product(x, GradientEdge(user, 0), torch.Size((len(x), p.shape[out])))
    return found


def _nodes(y: Tensor, stop: Container[Any] = ()) -> Iterator[Any]:
    seen: set[Any] = set()
    waiting = [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            if node not in stop:
                waiting += [following for following, _ in node.next_functions]
