"""Functions of the gradients of each example, by the rules of layers; every call checks them."""

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
from alignreg.tangents.kernel.taps import Site


def diagonals(rules: Rules, close: Close) -> dict[tuple[str, ...], Tensor]:
    """Return the products ``close`` of the rows within each example, by groups of parameters of one layer."""
    result, rest = by_example(rules, lambda _, gradients: gradients.diagonal(close, rules.limit))
    nothing = rules.at.y.new_zeros(rules.at.n, rules.at.c, 1, dtype=rules.at.gram_dtype)
    result |= {(name,): close(nothing, nothing) for name in sorted(rules.at.unused)}
    if rest:
        result |= {(name,): value for name, value in general.diagonal(rules.at, rest, close).items()}
    return result


def by_example(
    rules: Rules, measure: Callable[[Site, Gradients], Tensor]
) -> tuple[dict[tuple[str, ...], Tensor], list[str]]:
    """Return ``measure`` ``(n, ...)`` of the gradients of groups of parameters, and the parameters without a rule.

    A vector–Jacobian product checks the gradients of each group. The parameters of a group belong to one layer.
    """
    at = rules.at
    if at.couples_examples:
        return {}, list(rules.layer_of)
    u = signs(at.y)
    back = {name: value[0] for name, value in at.pullback(u[None], create_graph=False).items()}
    whole = torch.stack([value.square().sum(dtype=torch.float64).to(u.device) for value in back.values()]).sum().sqrt()
    measured: dict[tuple[str, ...], list[Tensor]] = {}
    pulled: dict[str, Tensor] = {}

    def consume(site: Site, gradients: Gradients, start: int) -> None:
        measured.setdefault(tuple(site.names.values()), []).append(measure(site, gradients))
        with torch.no_grad():
            part = gradients.pullback(u[start : start + gradients.n].to(at.gram_dtype))
        for kind, name in site.names.items():
            pulled[name] = pulled[name] + part[kind] if name in pulled else part[kind]

    def visits(batched: bool) -> None:
        measured.clear()
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
    # Drop groups whose rules applied in some of the passes only.
    complete = {names: parts for names, parts in measured.items() if sum(map(len, parts)) == at.n}
    verdicts = {names: torch.stack([holds(name) for name in names]).all() for names in complete}
    if verdicts:
        together = torch.stack(list(verdicts.values())).all()
        if not deferred.passes(together, ("examples", tuple(verdicts), at.precision), at.proven):
            for names, verdict in verdicts.items():
                if not bool(verdict):
                    del complete[names]
                    rules.refuse(names)
    return {names: torch.cat(parts) for names, parts in complete.items()}, rules.without(complete)
