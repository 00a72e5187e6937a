"""Features along directions, ΦS, by the first of several routes that runs and passes its check."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.func import jvp, vmap

from alignreg.checks import deferred
from alignreg.sketches.directions import Directions, FactoredDirections, parts_of
from alignreg.tangents.agreement import agrees, signs
from alignreg.tangents.batch import flat
from alignreg.tangents.frozen import failing_module
from alignreg.tangents.jacobian import JacobianRows, Params
from alignreg.tangents.kernel.directional import features as by_layers
from alignreg.tangents.kernel.passes import Rules
from alignreg.tangents.linearization import Linearization
from alignreg.tangents.primitives import Primitives

FEW_OUTPUTS = 2
"""The least number of directions per output for which the gradients of layers are used: they need one backward pass for
each output, forward mode one forward pass for each direction (``benchmarks/pushforward.py``)."""
Route = Callable[[Linearization, Params], Tensor]
"""Features ``(n, c, m)`` along directions ``(m, *shape)`` by parameter name."""


_REUSE = 64
"""How many times the activations of an example the parameters may be: far more in an MLP, less in networks with many
positions."""
_CACHE = 2**25
"""The number of bytes that stay in the caches of a CPU, about."""


def pushforward(rules: Rules, directions: Directions) -> Tensor:
    """Return ΦS ``(n, c, m)``, or raise a ``RuntimeError`` that names the module if every route fails."""
    at = rules.at
    if not directions.m:
        return at.y.new_empty(at.n, at.c, 0)
    failures: list[Exception] = []
    factored = any(isinstance(part, FactoredDirections) for part in parts_of(directions))
    if factored or (FEW_OUTPUTS * at.c <= directions.m and _layers_are_quicker(rules)):
        try:
            return by_layers(rules, directions)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if factored:
                raise
            failures.append(error)
    # Check ⟨u, ΦS⟩ = ⟨Φᵀu, S⟩ for random signs u, since both routes can fail without an error, for example on functions
    # that are differentiable only once.
    u = signs(at.y)
    back = {name: value[0] for name, value in at.pullback(u[None], create_graph=False).items()}
    # Never differentiate forward-mode formulas: they treat some variables as constants, which a check of values does
    # not detect.
    reverse = _double_reverse if at.vectorizes else _by_rows
    for route in (reverse,) if at.create_graph else (_forward_mode, reverse):
        try:
            return _checked(route, at, directions, u, back)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - the plain forward pass ran, so this is the route's own failure
            failures.append(error)
    at.require_repeatable()
    failures = failures[-1 if at.create_graph else -2 :]
    where = failing_module(failures[0], at.model)
    *forward, twice = (str(error).partition("\n")[0].removesuffix(".") for error in failures)
    raise RuntimeError(
        f"no pushforward through {where}: torch does not differentiate it "
        + "".join(f"in forward mode ({said}), nor " for said in forward)
        + f"twice in reverse mode ({twice}). Replace the operation, exclude the module from forward_fn, or select "
        "parameters after it. Metrics with method='exact' need only a first derivative."
    ) from failures[0]


def _checked(route: Route, at: Linearization, directions: Directions, u: Tensor, back: Params) -> Tensor:
    parts: list[Tensor] = []
    difference, norm = (torch.zeros((), dtype=torch.float64, device=u.device) for _ in range(2))
    step = _directions_at_once(at)
    for start in range(0, directions.m, step):
        stop = min(start + step, directions.m)
        some = {name: directions.block(name, p, start, stop) for name, p in at.params.items()}
        part = route(at, some)
        parts.append(part if at.create_graph else part.detach())
        part = part.detach().to(at.gram_dtype)
        left = torch.tensordot(u.to(part), part, dims=2)
        right = [flat(s).to(part.dtype) @ back[name].flatten().to(part.dtype) for name, s in some.items()]
        product = torch.stack([one.to(left.device) for one in right]).sum(0)
        difference += (left - product).detach().double().square().sum()
        norm += part.double().square().sum()
    holds = agrees(difference.sqrt(), norm.sqrt(), at.precision)
    if not deferred.passes(holds, (route.__name__, at.create_graph, at.precision), at.proven):
        raise RuntimeError(
            f"its forward derivative disagrees with its backward derivative by {float(difference) ** 0.5:.1e} "
            f"at a norm of {float(norm) ** 0.5:.1e}"
        )
    return torch.cat(parts, dim=-1)


def _forward_mode(at: Linearization, directions: Params) -> Tensor:
    # Detach, unless a graph is wanted, so that none is recorded.
    params = at.params if at.create_graph else {name: p.detach() for name, p in at.params.items()}

    def derivative(direction: Params) -> Tensor:
        result: Tensor = jvp(lambda p: at.function(p, at.x), (params,), (direction,))[1]
        return result

    with torch.set_grad_enabled(at.create_graph):
        result: Tensor = vmap(derivative, out_dims=-1, randomness="same")(directions)
        return result


def _double_reverse(at: Linearization, directions: Params) -> Tensor:
    # The map u ↦ Jᵀu is linear, so its vector–Jacobian product with s is J s.
    leaves = at.leaves()
    with Primitives(backward_only=True):
        y = at.function(leaves, at.x)
    u = torch.zeros_like(y, requires_grad=True)
    pulled = torch.autograd.grad(y, list(leaves.values()), u, create_graph=True, materialize_grads=True)
    linear = [(name, g) for name, g in zip(leaves, pulled, strict=True) if g.requires_grad]
    columns = [
        torch.autograd.grad(
            [g for _, g in linear],
            u,
            [directions[name][a] for name, _ in linear],
            retain_graph=True,
            create_graph=at.create_graph,
            materialize_grads=True,
        )[0]
        for a in range(len(next(iter(directions.values()))))
    ]
    return torch.stack(columns, dim=-1)


def _by_rows(at: Linearization, directions: Params) -> Tensor:
    def project(rows: Iterator[JacobianRows]) -> Tensor:
        parts = [[flat(part, 2) @ flat(directions[name]).T for name, part in row.items()] for _, row in rows]
        return torch.cat([torch.stack(part).sum(0) for part in parts])

    return at.reduce_rows(project)


def _layers_are_quicker(rules: Rules) -> bool:
    at = rules.at
    # Where weights are used once for an example, products with them cost as much as forward mode does.
    reused = _REUSE * at.activation_bytes >= at.n * sum(p.numel() * p.element_size() for p in at.params.values())
    return reused and not at.create_graph and rules.hold_for_most


def _directions_at_once(at: Linearization) -> int:
    if at.chunk_size is not None:
        return at.chunk_size
    # More than fit in a CPU's caches are slower there, while a GPU is idle between the operations of small networks.
    nbytes = 2 * sum(p.numel() * p.element_size() for p in at.params.values()) + at.activation_bytes
    quick = min(256, max(8, _CACHE // max(1, nbytes))) if at.y.device.type == "cpu" else 256
    return min(at.fit(nbytes, part=2), quick)
