"""The exact tangent kernel, by rules of layers where they hold and from Jacobians elsewhere, checked in every call."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, final

import torch
from torch import Tensor

from alignreg.checks import deferred
from alignreg.tangents.agreement import agrees
from alignreg.tangents.batch import Batch, concatenate, flat, shapes, slice_examples
from alignreg.tangents.kernel import general
from alignreg.tangents.kernel.gradients import Gradients
from alignreg.tangents.kernel.passes import Rules
from alignreg.tangents.kernel.taps import Site
from alignreg.tangents.linearization import Linearization

Tick = Callable[[float], None]
"""A function that is told how many more parameters are done."""


def kernels(rules: Rules, two: Linearization | None, tick: Tick) -> dict[str, Tensor]:
    """Return the kernel ``(n, c, n2, c)`` of each layer, zero for layers that the outputs do not depend on.

    The columns belong to the examples of ``two``, or ``None`` for those of the rows. A ``ValueError`` is raised if the
    examples of a batch depend on each other, and a ``RuntimeError`` if a kernel fails its self-check.
    """
    one, layer_of = rules.at, rules.layer_of
    check = _SelfCheck(one, two)
    while True:
        sums, done, torn = _by_rules(rules, two, check, tick)
        failing = check.failing(done)
        if not failing and not torn:
            break
        if failing:
            for at in (one, *(() if two is None else (two,))):
                at.require_independent_examples()
        for names in failing:
            rules.refuse(names)
        rules.refuse(torn, quietly=True)
    idle = (one.unused if two is None else one.unused | two.unused) - {name for names in done for name in names}
    tick(sum(one.params[name].numel() for name in idle))
    rest = {name: one.params[name].numel() for name in rules.without([*done, tuple(idle)])}
    rows = one.n * one.c + (0 if two is None else two.n * two.c)
    fit = one.fit(rows * one.gram_dtype.itemsize, part=2)
    for group in general.pieces(rest, sum(rest.values()) if one.create_graph else fit):
        for piece, value in general.gram(one, two, group):
            sums.add(layer_of[piece.name], value)
            tick(piece.stop - piece.start)

    members: dict[str, list[str]] = {}
    for name, layer in layer_of.items():
        members.setdefault(layer, []).append(name)
    by_layer = {layer: sums.kernel(layer) for layer in members}
    check.require(by_layer, members)
    return by_layer


class _Case(NamedTuple):
    """A computed kernel of some parameters."""

    names: tuple[str, ...]
    form: Tensor
    """The products of the kernel with random vectors."""
    norm: Tensor
    layer: str = ""


@final
class _SelfCheck:
    """The check that ωᵀK ω' = ⟨Φᵀω, Φᵀω'⟩ for random ω, ω', for groups of parameters and as a whole.

    It compares K ω' with Φ(Φᵀω') in the direction of ω. The same Φᵀω and Φᵀω' check all layers, whereas Φ Φ_lᵀω' would
    need a pushforward for each layer. One ω is random on the first half of the examples, another on the second half:
    both need one backward pass of the batch, and check K within and between the halves.
    """

    def __init__(self, one: Linearization, two: Linearization | None) -> None:
        self._one, self._two = one, two
        self._symmetric = two is None
        self._precision = (two or one).precision
        self._left = self._draw(one, seed=0)
        self._right = self._left if two is None else self._draw(two, seed=1)
        self._seen: dict[tuple[str, ...], Tensor] = {}
        self._norms: dict[tuple[str, ...], Tensor] = {}
        self._in_halves = not one.couples_examples
        self._expected = self._products()

    def clear(self) -> None:
        self._seen.clear()
        self._norms.clear()

    def see(
        self, names: tuple[str, ...], value: Tensor, rows: slice = slice(None), columns: slice = slice(None)
    ) -> None:
        """Add a product of rows, or its half, to the kernel of a group of parameters."""
        value = value.detach()
        form = self._form(value, rows, columns)
        if self._symmetric:
            form = form + form.T
        self._seen[names] = self._seen.get(names, torch.zeros_like(form)) + form
        norm = torch.linalg.vector_norm(value).double() * (2 if self._symmetric else 1)
        self._norms[names] = self._norms.get(names, torch.zeros_like(norm)) + norm

    def failing(self, groups: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Return the groups of parameters whose accumulated kernel fails the check."""
        cases = [_Case(names, self._seen[names], self._norms[names]) for names in groups]
        return [case.names for case in self._wrong(cases)]

    def require(self, kernels: Mapping[str, Tensor], names: Mapping[str, Sequence[str]]) -> None:
        """Raise a ``RuntimeError`` if the kernel of a layer, with parameters ``names``, fails the check."""
        cases = []
        for layer, kernel in kernels.items():
            value = kernel.detach()
            norm = torch.linalg.vector_norm(value).double()
            cases.append(_Case(tuple(names[layer]), self._form(value, slice(None), slice(None)), norm, layer))
        for layer, difference, norm in ((case.layer, *self._difference(case)) for case in self._wrong(cases)):
            raise RuntimeError(
                f"the tangent kernel{f' of layer {layer!r}' if layer else ''} failed its self-check: products with "
                f"random vectors differ from those of their pullbacks by {float(difference):.1e} at a norm of "
                f"{float(norm):.1e}. Is the model a deterministic function of its parameters and inputs?"
            )

    def _wrong(self, cases: Sequence[_Case]) -> list[_Case]:
        """Return the wrong cases; wait for the device at most once if there are none."""
        if not cases:
            return []
        right = torch.stack([self._holds(case) for case in cases])
        key = ("kernel", tuple(case.names for case in cases), self._one.precision)
        if deferred.passes(right.all(), key, self._one.proven):
            return []
        if self._in_halves:  # half a batch may be another function, for example if the model draws random numbers
            self._in_halves = False
            self._expected = self._products()
            return self._wrong(cases)
        return [case for case, one in zip(cases, right.tolist(), strict=True) if not one]

    def _holds(self, case: _Case) -> Tensor:
        whole = torch.stack([value.diagonal().abs().max() for value in self._expected.values()]).sum()
        digits = 1000 if self._one.couples_examples else 10  # with coupled examples, more terms cancel
        return agrees(*self._difference(case), self._precision, whole=whole, digits=digits)

    def _difference(self, case: _Case) -> tuple[Tensor, Tensor]:
        """Return the error of the products, and the norm of the kernel."""
        expected = torch.stack([self._expected[name] for name in case.names]).sum(0)
        return (case.form - expected).abs().max(), case.norm

    @staticmethod
    def _draw(at: Linearization, seed: int) -> Tensor:
        generator = torch.Generator(at.y.device).manual_seed(at.y.numel() + seed)
        omega = torch.randn(2, *at.y.shape, generator=generator, dtype=torch.float32, device=at.y.device)
        if at.n > 1:
            omega[0, at.n // 2 :] = 0
            omega[1, : at.n // 2] = 0
        return omega.to(at.gram_dtype)

    def _products(self) -> dict[str, Tensor]:
        """Return ⟨Φᵀω, Φᵀω'⟩ ``(2, 2)`` by parameter."""
        mine = self._pullback(self._one, self._left)
        theirs = mine if self._two is None else self._pullback(self._two, self._right)
        dtype = self._one.gram_dtype
        return {
            name: (flat(value).to(dtype) @ flat(theirs[name]).to(dtype).T).to(self._left.device, torch.float64)
            for name, value in mine.items()
        }

    def _pullback(self, at: Linearization, omega: Tensor) -> dict[str, Tensor]:
        omega = omega.to(at.y)
        if self._in_halves and at.n > 1:
            parts = (slice(0, at.n // 2), slice(at.n // 2, at.n))
            try:
                halves = [at.pullback(omega[i : i + 1, p], create_graph=False, examples=p) for i, p in enumerate(parts)]
                return {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
            except torch.OutOfMemoryError:
                raise
            except Exception:  # noqa: BLE001 - the model may accept batches of one size only
                self._in_halves = False
        return at.pullback(omega, create_graph=False)

    def _form(self, value: Tensor, rows: slice, columns: slice) -> Tensor:
        left, right = self._left[:, rows].flatten(1), self._right[:, columns].flatten(1)
        return (left @ (value.flatten(2).flatten(0, 1) @ right.T)).double()


@final
class _Totals:
    """Sums of tiles of the kernel of each layer, or of its half if it is symmetric."""

    def __init__(self, one: Linearization, two: Linearization | None) -> None:
        other = two or one
        self._shape = (one.n, one.c, other.n, other.c)
        self.numel = math.prod(self._shape)
        self._zeros = torch.zeros((), dtype=one.gram_dtype, device=one.y.device)
        self._symmetric = two is None
        self._total: dict[str, Tensor] = {}

    def clear(self) -> None:
        self._total.clear()

    def add(self, layer: str, value: Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> None:
        """Add to the tile ``[rows, :, columns]``."""
        if value.shape == self._shape and layer not in self._total:
            self._total[layer] = value
            return
        if layer not in self._total:
            self._total[layer] = self._zeros.new_zeros(self._shape)
        if value.requires_grad or self._total[layer].requires_grad:
            self._total[layer] = self._total[layer].clone()
        self._total[layer][rows, :, columns] += value

    def kernel(self, layer: str) -> Tensor:
        """Remove and return the kernel of a layer."""
        total = self._total.pop(layer, None)
        if total is None:
            return self._zeros.new_zeros(self._shape)
        return total + total.permute(2, 3, 0, 1) if self._symmetric else total


class _Tile(NamedTuple):
    """A part of the kernel, and the batch of examples whose gradients it needs."""

    batch: Batch
    rows: slice
    columns: slice
    diagonal: bool
    """True if rows and columns are the same examples, which the batch holds once; otherwise it holds rows first."""


def _by_rules(
    rules: Rules, two: Linearization | None, check: _SelfCheck, tick: Tick
) -> tuple[_Totals, list[tuple[str, ...]], set[str]]:
    """Return the sums by rules, the groups of parameters in them, and the parameters with a rule for some tiles only.

    The last must not be computed by rules, since their sums are incomplete.
    """
    one = rules.at
    totals = _Totals(one, two)
    done: Counter[tuple[str, ...]] = Counter()
    tiles = 0

    def consume(site: Site, gradients: Gradients, tile: _Tile) -> None:
        left, right = gradients, None
        if not tile.diagonal:
            split = tile.rows.stop - tile.rows.start
            left, right = gradients.take(0, split), gradients.take(split, gradients.n)
        value = left.gram(right, rules.limit)
        names = tuple(site.names.values())
        check.see(names, value, tile.rows, tile.columns)
        totals.add(rules.layer_of[names[0]], value, tile.rows, tile.columns)
        done[names] += 1
        share = value.numel() / totals.numel * (1 if tile.diagonal or two is not None else 2)
        tick(share * sum(one.params[name].numel() for name in names))

    def visits(batched: bool) -> None:
        nonlocal tiles
        tiles = 0
        totals.clear()
        done.clear()
        check.clear()
        for tile in _tiles(rules, two):
            tiles += 1
            rules.visit(tile.batch, partial(consume, tile=tile), batched=batched)

    rules.run(visits)
    complete = [names for names, times in done.items() if times == tiles]
    return totals, complete, {name for names in done.keys() - set(complete) for name in names}


def _tiles(rules: Rules, two: Linearization | None) -> Iterator[_Tile]:
    """Yield the tiles of the kernel, one for each pass of the model; only one if memory suffices."""
    one, step = rules.at, rules.examples_at_once
    if two is None and step >= one.n:
        yield _Tile(one.x, slice(0, one.n), slice(0, one.n), diagonal=True)
        return
    other = two or one
    if shapes(one.x) != shapes(other.x):
        return  # they cannot be joined in one batch, so no rules apply
    step = max(1, step // 2)
    for i in range(0, one.n, step):
        for j in range(0 if two is not None else i, other.n, step):
            rows, columns = slice(i, min(i + step, one.n)), slice(j, min(j + step, other.n))
            batch = slice_examples(one.x, rows.start, rows.stop)
            diagonal = two is None and rows == columns
            if not diagonal:
                batch = concatenate([batch, slice_examples(other.x, columns.start, columns.stop)])
            yield _Tile(batch, rows, columns, diagonal=diagonal)
