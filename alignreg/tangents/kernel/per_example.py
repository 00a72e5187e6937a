"""What is made of the gradients of each example alone, by the rules of layers; checked in every call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from alignreg.checks import deferred
from alignreg.tangents.agreement import agrees, signs
from alignreg.tangents.batch import slice_examples
from alignreg.tangents.kernel import general, passes
from alignreg.tangents.kernel.gradients import Close, Gradients
from alignreg.tangents.kernel.recorder import Site
from alignreg.tangents.linearization import Evaluation


def diagonals(
    at: Evaluation, layer_of: Mapping[str, str], close: Close, refused: set[str]
) -> dict[tuple[str, ...], Tensor]:
    """Return the products of each example's own rows, by groups of parameters of one layer.

    Args:
        at: the model at the examples.
        layer_of: the layer of each parameter.
        close: which products: :func:`.gradients.norms` or :func:`.gradients.blocks`.
        refused: parameters whose rule is known to fail; those that fail now are added.
    """
    result, rest = by_example(at, layer_of, lambda _, gradients: gradients.diagonal(close, passes.limit(at)), refused)
    if rest:
        result |= {(name,): value for name, value in general.diagonal(at, rest, close).items()}
    return result


def by_example(
    at: Evaluation,
    layer_of: Mapping[str, str],
    take: Callable[[Site, Gradients], Tensor],
    refused: set[str],
) -> tuple[dict[tuple[str, ...], Tensor], list[str]]:
    """Return what is taken of the gradients of each example, by groups of parameters of one layer, and what is left.

    What the rules say is checked by the vector–Jacobian product that follows from it.

    Args:
        at: the model at the examples.
        layer_of: the layer of each parameter.
        take: makes ``(n, ...)`` of the gradients of a group.
        refused: parameters whose rule is known to fail; those that fail now are added.

    Returns:
        The results, and the parameters that no rule took.
    """
    if at.couples_examples:
        return {}, list(layer_of)  # rules take the gradients of each example alone
    u = signs(at.y)
    back = {name: value[0] for name, value in at.pullback(u[None], create_graph=False).items()}
    whole = torch.stack([value.square().sum(dtype=torch.float64).to(u.device) for value in back.values()]).sum().sqrt()
    found: dict[tuple[str, ...], list[Tensor]] = {}
    pulled: dict[str, Tensor] = {}

    def consume(site: Site, gradients: Gradients, start: int) -> None:
        found.setdefault(tuple(site.names.values()), []).append(take(site, gradients))
        with torch.no_grad():
            part = gradients.pullback(u[start : start + gradients.n].to(at.gram_dtype))
        for kind, name in site.names.items():
            pulled[name] = pulled[name] + part[kind] if name in pulled else part[kind]

    def run(batched: bool) -> None:
        found.clear()
        pulled.clear()
        step = passes.examples_at_once(at)
        for start in range(0, at.n, step):
            batch = slice_examples(at.x, start, start + step)
            passes.visit(at, batch, layer_of, refused, partial(consume, start=start), batched=batched)

    def holds(name: str) -> Tensor:
        difference = torch.linalg.vector_norm(pulled[name] - back[name].flatten().to(pulled[name]))
        scale = torch.linalg.vector_norm(back[name].double()).to(u.device)
        return agrees(difference, scale, at.precision, whole=whole)

    passes.batched_or_not(run, layer_of, refused, vectorize=at.vectorizes)
    # The others the rules took in some of the blocks only.
    complete = {names for names, parts in found.items() if sum(len(part) for part in parts) == at.n}
    verdicts = {names: torch.stack([holds(name) for name in names]).all() for names in found if names in complete}
    if verdicts:
        together = torch.stack(list(verdicts.values())).all()
        if not deferred.passes(together, ("examples", tuple(verdicts), at.precision), at.proven):
            for names, verdict in verdicts.items():
                if not bool(verdict):
                    complete.discard(names)
                    passes.refuse(names, refused)
    found = {names: parts for names, parts in found.items() if names in complete}
    by_rules = {name for names in found for name in names}
    return {names: torch.cat(parts) for names, parts in found.items()}, [n for n in layer_of if n not in by_rules]
