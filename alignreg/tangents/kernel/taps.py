"""The calls with rules in one pass of a model, and the per-example gradients of the parameters in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from alignreg.tangents.kernel import layout
from alignreg.tangents.kernel.calls import Call, Lookups
from alignreg.tangents.kernel.compound import Behind, Parts, Tied
from alignreg.tangents.kernel.gradients import Factors, Gradients, OuterProducts, Rows
from alignreg.tangents.kernel.layout import Layout
from alignreg.tangents.kernel.sources import Source
from alignreg.tangents.kernel.tokens import TokenSums


class Site(NamedTuple):
    """Names of the parameters that are passed to calls together; ``None`` if not differentiated."""

    weight: str | None
    bias: str | None = None

    @property
    def names(self) -> dict[str, str]:
        """Parameter names by ``"weight"`` and ``"bias"``."""
        return {kind: name for kind, name in self._asdict().items() if name is not None}


class Pass(NamedTuple):
    """The settings of a backward pass."""

    signs: Tensor
    """The weights ``(c,)`` of the outputs of one example in the weighted sum over examples."""
    n: int
    dtype: torch.dtype
    create_graph: bool
    batched: bool
    limit: int
    """The largest number of entries for the gradients of a parameter, if they must be formed."""


@final
class Tap:
    """A call, and the gradients of its output as a backward pass reaches it."""

    def __init__(self, call: Call, sources: Mapping[str, Source], output: Tensor) -> None:
        self.call = call
        self.sources = dict(sources)
        if getattr(call, "transposed", False) and "weight" in sources:
            self.sources["weight"] = sources["weight"].transposed
        """The sources of its ``"weight"`` and ``"bias"``."""
        self.lead = call.region(output).shape[: call.lead]
        self.output: Tensor | None = None
        self.outputs = 0
        self.current: int | None = None
        self.arrived: Callable[[Tap], None] | None = None
        self.weighted: Tensor | None = None
        self._gradients: dict[int | None, Tensor] = {}
        self._located: tuple[Layout, Tensor] | None = None

    @property
    def names(self) -> set[str]:
        """The names of its parameters."""
        return {name for source in self.sources.values() for name in source.leaves}

    def is_doubtful(self, n: int) -> bool:
        """Return whether sizes do not determine the places of the examples; tokens may be shared positions."""
        partial = any(source.value.numel() < min(p.numel() for p in source.leaves.values()) for source in self._own())
        several = len(layout.candidates(self.lead, n)) > 1
        return n > 1 and (several or self.is_odd(n) or partial or isinstance(self.call, Lookups))

    def is_odd(self, n: int) -> bool:
        """Return whether no leading axis can be that of the examples."""
        return bool(self.lead) and not layout.candidates(self.lead, n)

    def _own(self) -> Iterable[Source]:
        return self.sources.values() if not isinstance(self.call, Lookups) else ()

    def receive(self, gradient: Tensor, *, batched: bool) -> None:
        """Store the gradient of one output of the model, or, batched, those of all outputs, ``(c, *shape)``."""
        if self.arrived is None:
            return
        if self.current is None and not batched:  # in a vectorized pass, it is the same for all outputs
            gradient = gradient.expand(self.outputs, *gradient.shape)
        self._gradients[self.current] = gradient  # as it is: autograd may be off here
        self.arrived(self)

    def locate(self, how: Pass) -> bool:
        """Find the examples after the gradients have arrived; return ``False`` if there is no layout."""
        some = next(iter(self._gradients.values()), None)
        if some is None or some.numel() == 0:
            return True
        d = (
            some
            if None in self._gradients
            else torch.stack([self._gradients.get(k, torch.zeros_like(some)) for k in range(self.outputs)])
        )
        d = self.call.region(d)
        possible = layout.candidates(self.lead, how.n)
        found: Layout | None
        if self.weighted is None:
            found = possible[0] if possible else None
        else:
            plain = torch.tensordot(how.signs.to(d), d.detach(), dims=1)
            weighted = self.call.region(self.weighted)
            found = layout.find(possible, plain, weighted, self.call.lead, how.n)
        self._located = None if found is None else (found, d)
        return found is not None

    def gradients(self, kinds: Iterable[str], dtype: torch.dtype) -> Factors | None:
        """Return the gradients of its weight, its bias or both; ``None`` if none has arrived."""
        if self._located is None:
            return None
        kinds = set(kinds)
        return self.call.gradients(*self._located, weight="weight" in kinds, bias="bias" in kinds, dtype=dtype)

    def clear(self) -> None:
        """Forget the gradients."""
        self._gradients.clear()
        self._located = self.weighted = None


@final
class Component:
    """Calls that are connected by shared parameters, whose gradients are summed together."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.taps = taps
        self.names = list(dict.fromkeys(name for tap in taps for s in tap.sources.values() for name in s.leaves))

    def gradients(self, layer_of: Mapping[str, str], how: Pass) -> Iterator[tuple[Site, Gradients]]:
        """Yield the per-example gradients of the parameters; one site has parameters of one layer only."""
        lost = {name for tap in self.taps if not tap.locate(how) for name in tap.names}
        site = None if lost else self._joint(layer_of)
        if site is not None:
            parts = [tap.gradients(site.names, how.dtype) for tap in self.taps]
            if (joined := _join(parts)) is not None:
                yield site, joined
        else:
            yield from self._one_by_one(lost, how)
        for tap in self.taps:
            tap.clear()

    def _joint(self, layer_of: Mapping[str, str]) -> Site | None:
        """Return the site of all calls if they use the same parameters in the same way; ``None`` otherwise."""
        first = self.taps[0]
        if len({layer_of[name] for name in self.names}) > 1 or len(self.names) > len(first.sources):
            return None
        for tap in self.taps:
            alike = type(tap.call) is type(first.call) and tap.sources.keys() == first.sources.keys()
            if not alike or not all(s.is_leaf and s.value is first.sources[k].value for k, s in tap.sources.items()):
                return None
        return Site(*(next(iter(first.sources[k].leaves), None) if k in first.sources else None for k in Site._fields))

    def _one_by_one(self, lost: set[str], how: Pass) -> Iterator[tuple[Site, Gradients]]:
        parts = [(s, tap.gradients([kind], how.dtype)) for tap in self.taps for kind, s in tap.sources.items()]
        some = [(source, part) for source, part in parts if part is not None and not lost & source.leaves.keys()]
        partial = {name for source, _ in parts if lost & source.leaves.keys() for name in source.leaves}
        parts.clear()
        rows = _DenseRows(how)
        for name in self.names:
            uses = [(source, part) for source, part in some if name in source.leaves]
            if not uses or name in lost | partial:
                continue
            value = _in_factors(name, uses, how) or rows.of(name, uses)
            if value is not None:
                yield Site(name), value


def _join(parts: Iterable[Factors | None]) -> Factors | None:
    some = [part for part in parts if part is not None]  # otherwise the outputs do not depend on them
    return some[0].join(some[1:]) if len(some) > 1 else some[0] if some else None


Uses = list[tuple[Source, Factors]]


def _in_factors(name: str, uses: Uses, how: Pass) -> Gradients | None:
    """Return the gradients of a parameter as factors; ``None`` if they must be formed."""
    if not all(source.keeps and source.is_unchanged for source, _ in uses):
        return None
    places: dict[tuple[int, ...], Uses] = {}
    for source, part in uses:
        places.setdefault(source.place, []).append((source, part))
    one_of = [group[0][0] for group in places.values()]
    if any(not a.is_apart(b) for i, a in enumerate(one_of) for b in one_of[:i]):
        return None
    pieces: list[Gradients] = []
    for group in places.values():
        inner = _of_one_value([part for _, part in group])
        if inner is None:
            return None
        source = group[0][0]
        pieces.append(inner if source.is_leaf else _behind(name, source, inner, how))
    return pieces[0] if len(pieces) == 1 else Parts(pieces)


def _of_one_value(parts: list[Factors]) -> Gradients | None:
    by_kind: dict[type[Factors], Factors] = {}
    for kind in {type(part) for part in parts}:
        these = [Rows({"weight": p.dense(0)}) if isinstance(p, Rows) else p for p in parts if type(p) is kind]
        joined = _join(these)
        assert joined is not None
        by_kind[kind] = joined
    if len(by_kind) == 1:
        return next(iter(by_kind.values()))
    tokens, maps = by_kind.get(TokenSums), by_kind.get(OuterProducts)
    if len(by_kind) == 2 and isinstance(tokens, TokenSums) and isinstance(maps, OuterProducts):
        return Tied(tokens, maps)
    return None


def _behind(name: str, source: Source, inner: Gradients, how: Pass) -> Behind:
    def back(rows: Tensor) -> Tensor:
        shaped = rows.reshape(-1, *source.value.shape)
        return source.back(shaped, create_graph=how.create_graph, batched=how.batched)[name]

    def dense(of: Gradients) -> Tensor:
        if isinstance(of, Tied):
            return of.tokens.dense(how.limit) + of.maps.dense(how.limit)
        assert isinstance(of, Factors)
        return of.dense(how.limit)

    return Behind(inner, back, dense)


@final
class _DenseRows:
    """The gradients of parameters through everything that was computed from them, as rows."""

    def __init__(self, how: Pass) -> None:
        self._how = how
        self._known: dict[int, dict[str, Tensor]] = {}

    def of(self, name: str, uses: Uses) -> Rows | None:
        """Return the gradients of one parameter; ``None`` if they need too much memory."""
        n, c = uses[0][1].n, uses[0][1].c
        numbers = max(sum(p.numel() for p in (s.value, *s.leaves.values())) for s, _ in uses)
        if n * c * numbers > self._how.limit:
            return None
        rows = [self._pulled(source, part)[name] for source, part in uses]
        total = rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)
        return Rows({"weight": total.reshape(n, c, -1)})

    def _pulled(self, source: Source, part: Factors) -> dict[str, Tensor]:
        if id(part) not in self._known:
            rows = part.dense(self._how.limit).reshape(-1, *source.value.shape)
            self._known[id(part)] = source.back(rows, create_graph=self._how.create_graph, batched=self._how.batched)
        return self._known[id(part)]


def components(taps: Sequence[Tap]) -> list[Component]:
    """Return the connected components of calls that share parameters."""
    of_name: dict[str, list[Tap]] = {}
    for tap in taps:
        for name in tap.names:
            of_name.setdefault(name, []).append(tap)
    found, seen = [], set()
    for tap in taps:
        if tap in seen:
            continue
        seen.add(tap)
        group, waiting = [tap], [tap]
        while waiting:
            for name in waiting.pop().names:
                new = [other for other in of_name[name] if other not in seen]
                seen.update(new)
                group += new
                waiting += new
        order = {one: place for place, one in enumerate(taps)} if len(group) > 1 else {}
        found.append(Component(sorted(group, key=lambda one: order.get(one, 0))))
    return found
