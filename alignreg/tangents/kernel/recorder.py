"""A forward pass that records what layers do with their parameters, and a backward pass for their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from alignreg.tangents.kernel import layout
from alignreg.tangents.kernel.gradients import Gradients
from alignreg.tangents.kernel.rules import ANYWHERE, COMPOSITES, EXPANSIONS, QUICKER, RULES, given, places
from alignreg.tangents.kernel.sources import Provenance, Source, is_integer, tensors_in
from alignreg.tangents.kernel.taps import Component, Pass, Site, Tap, components
from alignreg.tangents.primitives import is_checkpointed


@final
class Recorder(TorchFunctionMode):
    """A mode that records the calls of functions with rules inside the block.

    Calls are recognized by their parameters, or by tensors that were computed from parameters only, so it does not
    matter which module makes them.

    Args:
        params: the parameters to watch, by name.
        constants: the other parameters.
        inputs: the tensors with the examples on axis 0.
    """

    def __init__(self, params: Mapping[str, Tensor], constants: Iterable[Tensor], inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._made = Provenance(params, constants, inputs)
        # Every tap depends on this dummy leaf, so one backward pass to it visits them all.
        self._root = torch.zeros((), device="cpu", requires_grad=True)
        self._taps: list[Tap] = []
        self._n = len(inputs[0])
        self._elsewhere: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in((*args, *kwargs.values()))
        found = [x for x in tensors if self._made.source(x) is not None]
        if func in COMPOSITES and found and torch.is_grad_enabled():
            with self:
                composed = COMPOSITES[func](*args, **kwargs)
            if composed is not NotImplemented:
                return composed
        sources = [self._made.source(x) for x in found]
        depends = any(
            self._made.depends(x) and not (func is torch.Tensor.__getitem__ and is_integer(x))
            for x in tensors
            if self._made.source(x) is None
        )
        # Replacements are slower in formulas of weights, whose gradients come one for each row of the Jacobian.
        quicker = QUICKER[func] if depends and func in QUICKER and not is_checkpointed() else func
        result = quicker(*args, **kwargs)
        if not found or not torch.is_grad_enabled():
            if depends:
                self._made.touch(result)
            return result
        watched = {id(x): s for x, s in zip(found, sources, strict=True) if s is not None and s.leaves}
        taps = self._taps_of(func, args, kwargs, result, watched) if watched else {}
        if depends or any(self._is_use(func, tap, result) for tap in taps.values()):
            return self._use(result, taps, found)
        self._derive(func, args, result, found)
        return result

    def _taps_of(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        sources: Mapping[int, Source],
    ) -> dict[tuple[int, ...], Tap]:
        """Return the taps of a call, with the ids of the tensors that are their parameters."""
        if not isinstance(result, Tensor) or result.is_complex() or _is_wrapped(result) or "out" in kwargs:
            return {}
        found = {}
        if func in RULES and (call := RULES[func](*args, **kwargs)) is not None:
            mine = {kind: x for kind, x in given(RULES[func], args, kwargs).items() if id(x) in sources}
            if mine:
                of_kind = {kind: sources[id(x)] for kind, x in mine.items()}
                found[tuple(id(x) for x in mine.values())] = Tap(call, of_kind, result)
        elif func in ANYWHERE:
            for place, x in enumerate(places(ANYWHERE[func], args, kwargs)):
                if (source := sources.get(id(x))) is not None:
                    call = ANYWHERE[func](place, x.shape, result, *args, **kwargs)
                    if call is not None:
                        found[place, id(x)] = Tap(call, {"weight": source}, result)
        return found

    def _is_use(self, func: Callable[..., Any], tap: Tap, result: Tensor) -> bool:
        """Return whether a constant has an axis of examples, as the initial state of a recurrent layer has."""
        if self._n == 1:
            return func in EXPANSIONS
        y = tap.call.region(result.detach())
        axes = [axis for axis, size in enumerate(tap.lead) if size == self._n]
        # Constants along an axis of another kind, such as positions, differ from each other.
        return any(bool(((y - y.narrow(axis, 0, 1)).abs() <= 1e-3 * y.abs().amax()).all()) for axis in axes)

    def _use(self, result: Any, taps: Mapping[tuple[int, ...], Tap], found: list[Tensor]) -> Any:
        """Record a call whose result depends on sources and on the examples."""
        sources = {id(x): self._made.source(x) for x in found}
        self._made.touch(result)
        # Unless the result is only a shape or a dtype, parameters without a tap go the general way.
        if result is None or any(x.requires_grad for x in tensors_in((result,))):
            known = {i for key in taps for i in key}
            lost = [source for i, source in sources.items() if i not in known and source is not None]
            self._elsewhere |= {name for source in lost for name in source.leaves}
        for tap in taps.values():
            self._taps.append(tap)
            result = _Identity.apply(result, self._root, tap)  # type: ignore[no-untyped-call]
            tap.output = result
        return result

    def _derive(self, func: Callable[..., Any], args: tuple[Any, ...], result: Any, found: list[Tensor]) -> None:
        """Record a call whose result depends on sources and constants only."""
        made = any(x.requires_grad for x in tensors_in((result,)))
        hidden = func is torch.Tensor.__setitem__ or any(_is_wrapped(x) for x in tensors_in((result,)))
        if hidden or (made and is_checkpointed()):  # checkpointed modules run again
            self._elsewhere |= {name for x in found if (source := self._made.source(x)) for name in source.leaves}
        elif made:
            self._made.derive(func, args, result, found)

    def pull(self, y: Tensor, cotangent: Tensor, *, retain_graph: bool, create_graph: bool) -> None:
        """Run a backward pass from the outputs through all taps."""
        torch.autograd.grad(
            y, self._root, cotangent, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
        )

    def components(self, y: Tensor, signs: Tensor) -> list[Component]:
        """Return the calls by shared parameters, without the parameters that are used without a rule.

        ``y`` is the outputs ``(n, c)``, and ``signs`` are those of :class:`.taps.Pass`.
        """
        for tap in self._taps:
            tap.sources = {k: s for k, s in tap.sources.items() if not self._elsewhere & s.leaves.keys()}
        found = components([tap for tap in self._taps if tap.sources])
        doubtful: list[Tap] = []
        for component in found:
            odd = any(tap.is_odd(len(y)) for tap in component.taps)
            doubtful += [tap for tap in component.taps if odd or tap.is_doubtful(len(y))]
        if doubtful:
            # Sizes are ambiguous, but the gradient of a weighted sum over examples has the weight of each example.
            outputs = [tap.output for tap in doubtful if tap.output is not None]
            weights = layout.weights(len(y)).to(y)[:, None] * signs
            gradients = torch.autograd.grad(y, outputs, weights, retain_graph=True, materialize_grads=True)
            for tap, gradient in zip(doubtful, gradients, strict=True):
                tap.weighted = gradient
        for tap in self._taps:
            tap.output = None
        return found


def visit(
    run: Callable[[], Tensor],
    params: Mapping[str, Tensor],
    layer_of: Mapping[str, str],
    consume: Callable[[Site, Gradients], None],
    *,
    constants: Iterable[Tensor],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    create_graph: bool,
    batched: bool,
    limit: int,
) -> None:
    """Run the model forward and backward, and call ``consume`` with each layer's gradients once they are complete.

    ``run`` returns the outputs ``(n, c)``; only with ``create_graph`` may its inputs and parameters have a graph.
    ``params`` are the parameters to watch, ``constants`` the other ones, ``inputs`` the tensors with the examples, and
    ``limit`` is the largest number of entries for the gradients of a parameter, if they must be formed. ``dtype`` is
    that of products. ``batched`` uses one vectorized backward pass for all outputs, instead of one for each.
    """
    recorder = Recorder(params, constants, inputs)
    with recorder:
        y = run()
    if not y.requires_grad:
        return
    n, c = y.shape
    generator = torch.Generator().manual_seed(c)
    signs = torch.randn(c, generator=generator, device="cpu").to(y)
    of_tap = {tap: component for component in recorder.components(y, signs) for tap in component.taps}
    left = dict.fromkeys(of_tap.values())
    waiting = set(of_tap)
    how = Pass(signs=signs, n=n, dtype=dtype, create_graph=create_graph, batched=batched, limit=limit)

    def hand_over(component: Component) -> None:
        del left[component]
        for site, gradients in component.gradients(layer_of, how):
            consume(site, gradients)

    def arrived(tap: Tap) -> None:
        waiting.discard(tap)
        if batched and not waiting.intersection(of_tap[tap].taps):
            hand_over(of_tap[tap])

    cotangents = torch.eye(c, dtype=y.dtype, device=y.device)[:, None].expand(c, *y.shape)

    def pull(cotangent: Tensor, *, keep: bool) -> Tensor:
        recorder.pull(y, cotangent, retain_graph=keep or create_graph, create_graph=create_graph)
        return cotangent.new_zeros(())

    for tap in of_tap:
        tap.arrived, tap.outputs = arrived, c
    try:
        if batched:
            vmap(partial(pull, keep=False))(cotangents)
        else:
            for k, cotangent in enumerate(cotangents):
                for tap in of_tap:
                    tap.current = k
                pull(cotangent, keep=k + 1 < c)
    finally:
        for tap in of_tap:
            tap.arrived = None  # a graph to be differentiated outlives this pass
    with torch.set_grad_enabled(create_graph):
        for component in list(left):
            hand_over(component)


def _is_wrapped(x: Tensor) -> bool:
    """Return whether a tensor is inside a function transformation of the model's own, such as vmap."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))  # noqa: SLF001


@final
class _Identity(torch.autograd.Function):
    """A copy, which the model may change in place, that passes its gradient to the tap."""

    @staticmethod
    def forward(x: Tensor, root: Tensor, tap: Tap) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tap], output: Tensor) -> None:  # noqa: ARG004
        ctx.tap = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        _Arrival.apply(gradient, ctx.tap)  # type: ignore[no-untyped-call]
        return gradient, None, None


@final
class _Arrival(torch.autograd.Function):
    """A function that passes the whole gradient of a vectorized backward pass to the tap."""

    @staticmethod
    def forward(gradient: Tensor, tap: Tap) -> Tensor:
        tap.receive(gradient, batched=False)
        return gradient.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], gradient: Tensor, tap: Tap) -> tuple[Tensor, None]:  # noqa: ARG004
        tap.receive(gradient.movedim(in_dims[0], 0), batched=True)
        return gradient.new_zeros(()), None
