"""The Jacobian of the outputs with respect to named parameters, computed for a few examples at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor
from torch.func import jacrev, vmap

from alignreg.tangents.agreement import agrees, signs
from alignreg.tangents.batch import Batch, map_tensors, size, slice_examples

Params = dict[str, Tensor]
Function = Callable[[Params, Batch], Tensor]
JacobianRows = tuple[slice, Params]
"""Examples ``start:stop`` and, per parameter, their rows of the Jacobian ``(stop - start, c, *shape)``."""

T = TypeVar("T")


def reduce_jacobian(
    f: Function,
    params: Params,
    x: Batch,
    consume: Callable[[Iterator[JacobianRows]], T],
    *,
    outputs: int,
    rows: int,
    pullback: Callable[[Tensor], Params],
    before_whole_batch: Callable[[], None] | None = None,
    whole_batch: bool = False,
    vectorize: bool = True,
    create_graph: bool,
    precision: torch.dtype,
) -> T:
    """Feed the rows of the Jacobian to ``consume``, some examples at a time, and return its result.

    Four routes are tried in turn, from the fastest one to the one without assumptions: several examples together,
    vectorized; one example at a time, vectorized over its outputs, for models whose control flow depends on inputs; one
    example at a time, output by output; one output of one example of the whole batch at a time. All but the last
    assume that the outputs of an example depend on no other example. At the end, a route is checked against a
    vector–Jacobian product of the whole batch, u ``(n, c)`` ↦ Jᵀu = ``pullback(u)``, with a tolerance for the coarsest
    dtype in f, ``precision``. If the check fails, or torch cannot run the route, the next one is tried; in the end, a
    ``RuntimeError`` is raised.

    ``f`` maps (params, batch of n) to ``(n, c)`` with c = ``outputs``. ``consume`` is called anew for each route, and
    must iterate to the end. At most ``rows`` rows (example, output) of the Jacobian are in memory at once.
    ``before_whole_batch`` is called before the last route and may raise an error; ``whole_batch`` allows only the last
    route, for functions of all examples together; ``vectorize`` allows the first two.
    """
    n = size(x)
    u = signs(torch.empty(n, outputs, device="cpu"))
    expected = pullback(u)
    per_example = partial(_by_row, examples=1, create_graph=create_graph)
    last = partial(_by_row, examples=n, create_graph=create_graph)
    failure: Exception | None = None
    by_outputs = partial(_by_outputs, create_graph=create_graph)
    routes = (last,) if whole_batch else (_by_example, by_outputs, per_example, last)[0 if vectorize else 2 :]
    for route in routes:
        if route is last and before_whole_batch is not None:
            before_whole_batch()
        try:
            return consume(_checked(route(f, params, x, outputs, rows), u, expected, precision))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - the plain forward ran, so this is the route's own failure
            failure = error
    said = str(failure).partition("\n")[0].removesuffix(".")
    raise RuntimeError(
        "the Jacobian could not be computed: no route ran and agreed with the vector-Jacobian product of the batch. "
        f"Is the model a deterministic function of its parameters and inputs? The last route said: {said}."
    ) from failure


def _by_example(f: Function, params: Params, x: Batch, outputs: int, rows: int) -> Iterator[JacobianRows]:
    def jacobian(example: Batch) -> Params:
        def single(p: Params) -> Tensor:
            return f(p, map_tensors(lambda t: t.unsqueeze(0), example)).squeeze(0)

        result: Params = jacrev(single, chunk_size=min(rows, outputs))(params)
        return result

    step = max(1, rows // outputs)
    for start in range(0, size(x), step):
        stop = min(start + step, size(x))
        yield slice(start, stop), vmap(jacobian, randomness="same")(slice_examples(x, start, stop))


def _by_outputs(
    f: Function, params: Params, x: Batch, outputs: int, rows: int, *, create_graph: bool
) -> Iterator[JacobianRows]:
    leaves = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in params.items()}
    for start in range(size(x)):
        y = f(leaves, slice_examples(x, start, start + 1))[0]
        cotangents = torch.eye(outputs, dtype=y.dtype, device=y.device)
        parts = [
            torch.autograd.grad(
                y,
                list(leaves.values()),
                some,
                retain_graph=True,
                create_graph=create_graph,
                is_grads_batched=True,
                materialize_grads=True,
            )
            for some in torch.split(cotangents, max(1, rows))
        ]
        columns = (torch.cat(column)[None] for column in zip(*parts, strict=True))
        yield slice(start, start + 1), dict(zip(leaves, columns, strict=True))


def _by_row(
    f: Function, params: Params, x: Batch, outputs: int, rows: int, *, examples: int, create_graph: bool
) -> Iterator[JacobianRows]:
    names = list(params)
    leaves = [p if p.requires_grad else p.detach().requires_grad_() for p in params.values()]
    step = max(1, rows // outputs)
    for first in range(0, size(x), examples):
        y = f(dict(zip(names, leaves, strict=True)), slice_examples(x, first, first + examples))
        for start in range(0, len(y), step):
            stop = min(start + step, len(y))
            gradients = [
                torch.autograd.grad(
                    y[i, k], leaves, retain_graph=True, create_graph=create_graph, materialize_grads=True
                )
                if y.requires_grad
                else [torch.zeros_like(leaf) for leaf in leaves]  # the outputs depend on none of these parameters
                for i in range(start, stop)
                for k in range(outputs)
            ]
            rows_of = {
                name: rearrange(torch.stack([g.to_dense() for g in column]), "(n c) ... -> n c ...", c=outputs)
                for name, column in zip(names, zip(*gradients, strict=True), strict=True)
            }
            yield slice(first + start, first + stop), rows_of


def _checked(
    jacobian: Iterator[JacobianRows], u: Tensor, expected: Params, precision: torch.dtype
) -> Iterator[JacobianRows]:
    total = {name: torch.zeros_like(value) for name, value in expected.items()}
    energy = {name: torch.zeros((), dtype=torch.float64, device=value.device) for name, value in expected.items()}
    for examples, rows in jacobian:
        for name, value in rows.items():
            flat = value.detach().flatten(0, 1)
            total[name] += torch.tensordot(u[examples].flatten().to(flat), flat, dims=1)
            energy[name] += flat.to(torch.promote_types(flat.dtype, torch.float32)).square().sum()
        yield examples, rows
    device = next(iter(expected.values())).device
    whole = torch.stack([one.to(device) for one in energy.values()]).sum().sqrt()
    for name, value in expected.items():
        # For random signs u, E‖Jᵀu‖² = ‖J‖_F² is the scale of rounding errors. Where a derivative vanishes (a bias
        # before a normalization), the remainder is the rounding error of the terms that cancel, at all positions of all
        # examples if batch statistics couple them. This is hundreds of eps, so add a tenth of the whole.
        difference = torch.linalg.vector_norm((total[name] - value).to(torch.float64)).to(device)
        norm = energy[name].to(device).sqrt()
        if not bool(agrees(difference, norm + whole / 10, precision)):
            raise RuntimeError(
                f"rows of the Jacobian of {name!r} differ from its vector-Jacobian product by {float(difference):.1e}, "
                f"at a norm of {float(norm):.1e}"
            )
