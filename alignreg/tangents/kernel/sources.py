"""A record of the tensors in a forward pass that depend only on parameters, and of those that depend on examples."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Any]


class Source(NamedTuple):
    """A parameter, or a tensor that was computed from parameters and constants, and is the same for all examples."""

    leaves: Mapping[str, Tensor]
    """The parameters, by name."""
    value: Tensor
    """The tensor, with its graph."""
    keeps: bool
    """True if the derivative J of the value has J Jᵀ = 1, as that of a view, a permutation, a part or a sum with a
    constant. Gradients of the value then have the same products as gradients of the parameter."""
    version: int
    """The version of the value, which changes in place increase."""

    @property
    def is_leaf(self) -> bool:
        """Whether the value is a parameter."""
        return any(self.value is leaf for leaf in self.leaves.values())

    @property
    def transposed(self) -> Source:
        """The source with the last two axes of its value exchanged."""
        return _source(self.leaves, self.value.mT, keeps=self.keeps and self.is_unchanged)

    @property
    def is_unchanged(self) -> bool:
        """Whether the value has not changed in place."""
        return self.value._version == self.version  # noqa: SLF001 - of changes in place

    @property
    def place(self) -> tuple[int, ...]:
        """A key that is equal for equal views of one parameter, and unique for other values."""
        storage = self.value.untyped_storage().data_ptr()
        if all(storage != leaf.untyped_storage().data_ptr() for leaf in self.leaves.values()):
            return (id(self.value),)
        return storage, self.value.storage_offset(), *self.value.shape, *self.value.stride()

    def is_apart(self, other: Source) -> bool:
        """Return whether both are views of one parameter that share no entry."""
        if len(self.place) == 1 or len(other.place) == 1 or self.place[0] != other.place[0]:
            return False
        (start, stop), (first, last) = _extent(self.value), _extent(other.value)
        return stop <= first or last <= start

    def back(self, rows: Tensor, *, create_graph: bool, batched: bool) -> dict[str, Tensor]:
        """Return Jᵀ times cotangents ``(m, *value.shape)``, flat ``(m, p)``, by parameter name.

        ``create_graph`` makes the result differentiable; ``batched`` uses one vectorized pass if torch can.
        """
        if self.is_leaf:
            return {name: rows.reshape(len(rows), -1) for name in self.leaves}
        leaves = list(self.leaves.values())
        cotangents = rows.to(self.value)

        def pull(cotangent: Tensor, *, at_once: bool) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(
                self.value,
                leaves,
                cotangent,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
                is_grads_batched=at_once,
            )

        columns: Sequence[Sequence[Tensor | None]] = ()
        if batched:
            try:
                columns = [[column] for column in pull(cotangents, at_once=True)]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation has no batching rule
                pass
        if not columns:
            columns = list(zip(*(pull(one, at_once=False) for one in cotangents), strict=True))
            columns = [[None if g is None else g.to_dense()[None] for g in column] for column in columns]
        return {
            name: torch.cat(
                [rows.new_zeros(1, leaf.numel()) if g is None else g.reshape(len(g), -1).to(rows) for g in column]
            ).expand(len(rows), -1)
            for (name, leaf), column in zip(self.leaves.items(), columns, strict=True)
        }


def _source(leaves: Mapping[str, Tensor], value: Tensor, *, keeps: bool) -> Source:
    return Source(leaves, value, keeps, value._version)  # noqa: SLF001


def _extent(x: Tensor) -> tuple[int, int]:
    start = x.storage_offset()
    return int(start), int(
        start + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    )


@final
class Provenance:
    """A record of both kinds of tensors, updated for each call of a torch function.

    Args:
        params: the parameters to watch, by name.
        constants: other tensors that do not depend on the examples, although they may require gradients.
        inputs: the tensors with the examples on axis 0.
    """

    def __init__(self, params: Mapping[str, Tensor], constants: Iterable[Tensor], inputs: Sequence[Tensor]) -> None:
        self._alive = [*params.values(), *constants]  # ids of tensors are unique only while they are alive
        self._sources = {id(p): _source({}, p, keeps=True) for p in self._alive if p.requires_grad}
        self._sources |= {id(p): _source({name: p}, p, keeps=True) for name, p in params.items()}
        self._touched = weakref.WeakValueDictionary({id(x): x for x in inputs})

    def source(self, x: Any) -> Source | None:
        """Return the source of a tensor; ``None`` if it is not computed from parameters only."""
        return self._sources.get(id(x))

    def depends(self, x: Tensor) -> bool:
        """Return whether a tensor that is not a source may depend on the examples."""
        return x.requires_grad or id(x) in self._touched

    def touch(self, result: Any) -> None:
        """Record that results depend on the examples; tensors that require gradients and are not sources always do."""
        for x in _tensors(result):
            self._sources.pop(id(x), None)  # it was changed in place
            if not x.requires_grad:
                self._touched[id(x)] = x

    def derive(self, func: Function, args: Sequence[Any], result: Any, found: Sequence[Tensor]) -> None:
        """Record the sources of the result of ``func(*args)``, computed from sources ``found`` and constants."""
        sources = [self._sources[id(x)] for x in found]
        for x in _tensors(result):
            if x.requires_grad and id(x) not in self._sources:
                self._sources[id(x)] = _derived(func, args, x, found[0], sources)
                self._alive.append(x)


def _derived(func: Function, args: Sequence[Any], x: Tensor, first: Tensor, sources: Sequence[Source]) -> Source:
    leaves = {name: leaf for source in sources for name, leaf in source.leaves.items()}
    if len(sources) > 1:
        return _source(leaves, x, keeps=False)
    (source,) = sources
    if x.shape == first.shape and func in _SAME:
        return source
    keeps = (
        func in _SAME | _VIEWS
        or (func in _SHIFTS and x.shape == first.shape)
        or (func in _INDEX and _is_basic(args[1]))
        or (func is F.embedding and _looks_up_once(*args))
    )
    return _source(leaves, x, keeps=keeps and source.keeps and source.is_unchanged)


def _looks_up_once(tokens: Tensor, weight: Tensor, padding: int | None = None, *_: Any) -> bool:
    some = torch.unique(tokens)
    return len(some) == tokens.numel() and (padding is None or not bool((some == padding % len(weight)).any()))


def _is_basic(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or isinstance(part, int | slice) or is_integer(part) for part in parts)


def is_integer(x: Any) -> bool:
    """Return whether a tensor is an integer index, which selects a part of a tensor as an int does."""
    return isinstance(x, Tensor) and x.ndim == 0 and not x.is_floating_point() and x.dtype != torch.bool


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among values, including those in tuples and lists."""
    return list(_tensors(tuple(values)))


def _getter(attribute: Any) -> Function:
    getter: Function = attribute.__get__
    return getter


_Tensor = torch.Tensor
_INDEX = {_Tensor.__getitem__, _Tensor.select, torch.select}
_SAME = {
    *(_Tensor.to, _Tensor.float, _Tensor.double, _Tensor.half, _Tensor.bfloat16, _Tensor.type_as, _Tensor.type),
    *(_Tensor.contiguous, _Tensor.clone, torch.clone, _Tensor.view, _Tensor.reshape, torch.reshape, _Tensor.view_as),
}
"""Functions that return their argument, up to its dtype and layout, if the shape stays the same."""
_VIEWS = {
    *(_Tensor.flatten, torch.flatten, _Tensor.unflatten, torch.unflatten, _Tensor.ravel, _Tensor.reshape_as),
    *(_Tensor.transpose, torch.transpose, _Tensor.permute, torch.permute, _Tensor.t, torch.t, _Tensor.swapaxes),
    *(_Tensor.movedim, torch.movedim, _Tensor.unsqueeze, torch.unsqueeze, _Tensor.squeeze, torch.squeeze),
    *(_getter(_Tensor.T), _getter(_Tensor.mT), _Tensor.flip, torch.flip),
    *(_Tensor.narrow, torch.narrow, _Tensor.split, torch.split, _Tensor.chunk, torch.chunk),
    *(_Tensor.unbind, torch.unbind, _Tensor.neg, torch.neg),
}
"""Functions whose results contain each entry of their argument at most once, up to its sign."""
_SHIFTS = {_Tensor.add, torch.add, _Tensor.sub, torch.sub, _Tensor.__rsub__}
