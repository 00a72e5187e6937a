"""What is made of the gradients of each example alone, by the rules of layers; checked in every call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from alignreg.checks import deferred
from alignreg.tangents.agreement import agrees, signs
from alignreg.tangents.batch import slice_examples
from alignreg.tangents.kernel import general
from alignreg.tangents.kernel.gradients import Close, Gradients
from alignreg.tangents.kernel.passes import Rules
from alignreg.tangents.kernel.recorder import Site


def diagonals(rules: Rules, close: Close) -> dict[tuple[str, ...], Tensor]:
    """Return the products of each example's own rows, by groups of parameters of one layer.

    Args:
        rules: those of the model at the examples.
        close: which products: :func:`.gradients.norm_of_each` or :func:`.gradients.gram_of_each`.
    """
    result, rest = by_example(rules, lambda _, gradients: gradients.diagonal(close, rules.limit))
    if rest:
        result |= {(name,): value for name, value in general.diagonal(rules.at, rest, close).items()}
    return result


def by_example(
    rules: Rules, measure: Callable[[Site, Gradients], Tensor]
) -> tuple[dict[tuple[str, ...], Tensor], list[str]]:
    """Return a measure of the gradients of each example, by groups of parameters of one layer, and what is left.

    What the rules say is checked by the vector–Jacobian product that follows from it.

    Args:
        rules: those of the model at the examples.
        measure: makes ``(n, ...)`` of the gradients of a group.

    Returns:
        The results, and the parameters that no rule took.
    """
    at = rules.at
    if at.couples_examples:
        return {}, list(rules.layer_of)
    u = signs(at.y)
    back = {name: value[0] for name, value in at.pullback(u[None], create_graph=False).items()}
    whole = torch.stack([value.square().sum(dtype=torch.float64).to(u.device) for value in back.values()]).sum().sqrt()
    found: dict[tuple[str, ...], list[Tensor]] = {}
    pulled: dict[str, Tensor] = {}

    def consume(site: Site, gradients: Gradients, start: int) -> None:
        found.setdefault(tuple(site.names.values()), []).append(measure(site, gradients))
        with torch.no_grad():
            part = gradients.pullback(u[start : start + gradients.n].to(at.gram_dtype))
        for kind, name in site.names.items():
            pulled[name] = pulled[name] + part[kind] if name in pulled else part[kind]

    def visits(batched: bool) -> None:
        found.clear()
        pulled.clear()
        step = rules.examples_at_once
        for start in range(0, at.n, step):
            batch = slice_examples(at.x, start, start + step)
            rules.visit(batch, partial(consume, start=start), batched=batched)

    def holds(name: str) -> Tensor:
        difference = torch.linalg.vector_norm(pulled[name] - back[name].flatten().to(pulled[name]))
        scale = torch.linalg.vector_norm(back[name].double()).to(u.device)
        return agrees(difference, scale, at.precision, whole=whole)

    rules.run(visits)
    # The others the rules took in some of the passes only.
    complete = {names for names, parts in found.items() if sum(len(part) for part in parts) == at.n}
    verdicts = {names: torch.stack([holds(name) for name in names]).all() for names in found if names in complete}
    if verdicts:
        together = torch.stack(list(verdicts.values())).all()
        if not deferred.passes(together, ("examples", tuple(verdicts), at.precision), at.proven):
            for names, verdict in verdicts.items():
                if not bool(verdict):
                    complete.discard(names)
                    rules.refuse(names)
    found = {names: parts for names, parts in found.items() if names in complete}
    return {names: torch.cat(parts) for names, parts in found.items()}, rules.without(found)
