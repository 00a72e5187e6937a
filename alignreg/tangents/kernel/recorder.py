"""A forward pass that records what layers do with their parameters, and a backward pass for their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from alignreg.tangents.agreement import signs
from alignreg.tangents.kernel.calls import Call, Lookups
from alignreg.tangents.kernel.gradients import Gradients
from alignreg.tangents.kernel.layout import Layout, candidates, explains
from alignreg.tangents.kernel.rules import COMPOSITES, QUICKER, RULES, SIGNATURES
from alignreg.tangents.primitives import is_checkpointed


class Site(NamedTuple):
    """Names of the parameters that are passed to calls together; ``None`` if not differentiated."""

    weight: str | None
    bias: str | None

    @property
    def names(self) -> dict[str, str]:
        """Parameter names by ``"weight"`` and ``"bias"``."""
        return {kind: name for kind, name in self._asdict().items() if name is not None}


@final
class Recorder(TorchFunctionMode):
    """A mode that records the calls of functions with rules inside the block.

    Calls are recognized by their parameters, so it does not matter which module makes them.

    Args:
        params: the parameters to watch, by name.
        layer_of: the layer of each; a call with parameters of different layers has no rule.
    """

    def __init__(self, params: Mapping[str, Tensor], layer_of: Mapping[str, str]) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in params.items()}
        self._layer_of = layer_of
        # Every tap depends on this dummy leaf, so one backward pass to it visits them all.
        self._root = torch.zeros((), device="cpu", requires_grad=True)
        self._sites: dict[Site, list[_Tap]] = {}
        self._elsewhere: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSITES:
            with self:
                return COMPOSITES[func](*args, **kwargs)
        quicker = func if func not in QUICKER or is_checkpointed() else QUICKER[func]
        result = quicker(*args, **kwargs)
        watched = {self._names[id(value)] for value in (*args, *kwargs.values()) if id(value) in self._names}
        if not watched or not torch.is_grad_enabled():
            return result
        call = RULES[func](*args, **kwargs) if func in RULES else None
        if call is None:
            # The result is only a shape or a dtype, or there is no rule for the function.
            if isinstance(result, Tensor | tuple | list) and not isinstance(result, torch.Size):
                self._elsewhere |= watched
            return result
        given = SIGNATURES[func].bind(*args, **kwargs).arguments
        site = Site(*(self._names.get(id(given.get(kind))) for kind in Site._fields))
        self._elsewhere |= watched - set(site.names.values())
        if not site.names:
            return result
        taps = self._sites.setdefault(site, [])
        alike = all(type(call) is type(tap.call) for tap in taps)
        if not alike or len({self._layer_of[name] for name in site.names.values()}) > 1:
            self._elsewhere |= watched
            return result
        tap = _Tap(call, result.shape[: call.lead])
        taps.append(tap)
        tapped: Tensor = _Identity.apply(result, self._root, tap)  # type: ignore[no-untyped-call]
        tap.output = tapped
        return tapped

    def pull(self, y: Tensor, cotangent: Tensor, *, retain_graph: bool, create_graph: bool) -> None:
        """Run a backward pass from the outputs through all taps."""
        torch.autograd.grad(
            y, self._root, cotangent, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
        )

    def sites(self, y: Tensor) -> dict[Site, list[_Tap]]:
        """Return the calls by site, if rules cover all uses of the parameters, and the axis of examples is known.

        ``y`` is the outputs ``(n, c)``.
        """
        of_name: dict[str, set[Site]] = {}
        for site in self._sites:
            for name in site.names.values():
                of_name.setdefault(name, set()).add(site)
        torn = {name for name, sites in of_name.items() if len(sites) > 1} | self._elsewhere
        sites = {site: taps for site, taps in self._sites.items() if not torn & set(site.names.values())}
        if taps := [tap for taps in sites.values() for tap in taps]:
            _find_examples(taps, y)
        return {site: taps for site, taps in sites.items() if all(tap.layout is not None for tap in taps)}


def _find_examples(taps: list[_Tap], y: Tensor) -> None:
    doubtful = []
    for tap in taps:
        possible = candidates(tap.lead, len(y))
        tap.layout = possible[0] if possible else None
        # Tokens may be positions that are the same for all examples, in the same number by coincidence.
        if len(possible) > 1 or (possible and len(y) > 1 and isinstance(tap.call, Lookups)):
            doubtful.append((tap, possible))
    if doubtful:
        # Sizes are ambiguous, but the outputs of the first example have no gradient at the other examples.
        outputs = [tap.output for tap, _ in doubtful if tap.output is not None]
        gradients = torch.autograd.grad(y[0], outputs, signs(y[0]), retain_graph=True, materialize_grads=True)
        for (tap, possible), gradient in zip(doubtful, gradients, strict=True):
            tap.layout = next((layout for layout in possible if explains(layout, gradient, tap.call.lead)), None)
    for tap in taps:
        tap.output = None


def visit(
    run: Callable[[], Tensor],
    params: Mapping[str, Tensor],
    layer_of: Mapping[str, str],
    consume: Callable[[Site, Gradients], None],
    *,
    dtype: torch.dtype,
    create_graph: bool,
    batched: bool,
) -> None:
    """Run the model forward and backward, and call ``consume`` with each layer's gradients once they are complete.

    ``run`` returns the outputs ``(n, c)``; only with ``create_graph`` may its inputs and parameters have a graph.
    ``params`` are the parameters to watch, and ``dtype`` is that of products. ``batched`` uses one vectorized backward
    pass for all outputs, instead of one for each.
    """
    recorder = Recorder(params, layer_of)
    with recorder:
        y = run()
    if not y.requires_grad:
        return
    sites = recorder.sites(y)
    of_tap = {tap: site for site, taps in sites.items() for tap in taps}
    waiting = set(of_tap)
    c = y.shape[1]

    def hand_over(site: Site) -> None:
        taps = sites.pop(site)
        weight, bias = site.weight is not None, site.bias is not None
        parts = [tap.per_example(weight=weight, bias=bias, dtype=dtype) for tap in taps]
        some = [part for part in parts if part is not None]
        for tap in taps:
            tap.gradients.clear()
        if some:  # otherwise the outputs do not depend on the parameters
            consume(site, some[0].join(some[1:]) if len(some) > 1 else some[0])

    def arrived(tap: _Tap) -> None:
        waiting.discard(tap)
        if batched and not waiting.intersection(sites[of_tap[tap]]):
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
        for site in list(sites):
            hand_over(site)


@final
class _Tap:
    """A call, and the gradients of its output as a backward pass reaches it."""

    def __init__(self, call: Call, lead: torch.Size) -> None:
        self.call = call
        self.lead = lead
        self.layout: Layout | None = None
        self.output: Tensor | None = None
        self.outputs = 0
        self.current: int | None = None
        self.gradients: dict[int | None, Tensor] = {}
        self.arrived: Callable[[_Tap], None] | None = None

    def receive(self, gradient: Tensor, *, batched: bool) -> None:
        """Store the gradient of one output of the model, or, batched, those of all outputs, ``(c, *shape)``."""
        if self.arrived is None:
            return
        if self.current is None and not batched:  # in a vectorized pass, it is the same for all outputs
            gradient = gradient.expand(self.outputs, *gradient.shape)
        self.gradients[self.current] = gradient
        self.arrived(self)

    def per_example(self, *, weight: bool, bias: bool, dtype: torch.dtype) -> Gradients | None:
        """Return the per-example gradients of the call's parameters; ``None`` if no gradient has arrived."""
        if self.layout is None or not self.gradients:
            return None
        some = next(iter(self.gradients.values()))
        if None not in self.gradients:
            some = torch.stack([self.gradients.get(k, torch.zeros_like(some)) for k in range(self.outputs)])
        return self.call.gradients(self.layout, some, weight=weight, bias=bias, dtype=dtype)


@final
class _Identity(torch.autograd.Function):
    """A copy, which the model may change in place, that passes its gradient to the tap."""

    @staticmethod
    def forward(x: Tensor, root: Tensor, tap: _Tap) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, _Tap], output: Tensor) -> None:  # noqa: ARG004
        ctx.tap = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        _Arrival.apply(gradient, ctx.tap)  # type: ignore[no-untyped-call]
        return gradient, None, None


@final
class _Arrival(torch.autograd.Function):
    """A function that passes the whole gradient of a vectorized backward pass to the tap."""

    @staticmethod
    def forward(gradient: Tensor, tap: _Tap) -> Tensor:
        tap.receive(gradient, batched=False)
        return gradient.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], gradient: Tensor, tap: _Tap) -> tuple[Tensor, None]:  # noqa: ARG004
        tap.receive(gradient.movedim(in_dims[0], 0), batched=True)
        return gradient.new_zeros(()), None
