"""One forward pass that notes what layers do with their parameters, one backward pass that brings their gradients."""

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
    """Names of the parameters that go into calls together; ``None`` for what is not differentiated."""

    weight: str | None
    bias: str | None

    @property
    def names(self) -> dict[str, str]:
        """Parameter names by ``"weight"`` and ``"bias"``."""
        return {kind: name for kind, name in self._asdict().items() if name is not None}


@final
class Recorder(TorchFunctionMode):
    """Notes the calls of functions with rules inside the block, as functions of the parameters they are given.

    Functions are recognized by the tensor that they get as weight, so it does not matter which module calls them.

    Args:
        params: the parameters to watch, by name.
        layer_of: the layer of each: parameters of different layers are not taken together.
    """

    def __init__(self, params: Mapping[str, Tensor], layer_of: Mapping[str, str]) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in params.items()}
        self._layer_of = layer_of
        # Every tap hangs on this leaf: its gradient, which is none, makes autograd come by all of them.
        self._root = torch.zeros((), device="cpu", requires_grad=True)
        self._sites: dict[Site, list[_Tap]] = {}
        self._elsewhere: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function; note it if it has a rule and gets a watched parameter."""
        kwargs = kwargs or {}
        if func in COMPOSITES:
            with self:
                return COMPOSITES[func](*args, **kwargs)
        quicker = func if func not in QUICKER or is_checkpointed() else QUICKER[func]
        result = quicker(*args, **kwargs)
        found = {self._names[id(value)] for value in (*args, *kwargs.values()) if id(value) in self._names}
        if not found or not torch.is_grad_enabled():
            return result
        call = RULES[func](*args, **kwargs) if func in RULES else None
        if call is None:
            # A shape or a dtype was asked for, or the parameter goes into what no rule knows.
            if isinstance(result, Tensor | tuple | list) and not isinstance(result, torch.Size):
                self._elsewhere |= found
            return result
        given = SIGNATURES[func].bind(*args, **kwargs).arguments
        site = Site(*(self._names.get(id(given.get(kind))) for kind in Site._fields))
        self._elsewhere |= found - set(site.names.values())
        if not site.names:
            return result
        taps = self._sites.setdefault(site, [])
        alike = all(type(call) is type(tap.call) for tap in taps)
        if not alike or len({self._layer_of[name] for name in site.names.values()}) > 1:
            self._elsewhere |= found
            return result
        tap = _Tap(call, result.shape[: call.lead])
        taps.append(tap)
        tapped: Tensor = _Identity.apply(result, self._root, tap)  # type: ignore[no-untyped-call]
        tap.output = tapped
        return tapped

    def pull(self, y: Tensor, cotangent: Tensor, *, retain_graph: bool, create_graph: bool) -> None:
        """Let a gradient of the outputs come by all the taps."""
        torch.autograd.grad(
            y, self._root, cotangent, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
        )

    def sites(self, y: Tensor) -> dict[Site, list[_Tap]]:
        """Return the calls by site, where a rule knows all that happens to the parameters and where examples are.

        Args:
            y: the outputs ``(n, c)``.
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
        # Tokens may be positions, the same for all examples and by chance as many.
        if len(possible) > 1 or (possible and len(y) > 1 and isinstance(tap.call, Lookups)):
            doubtful.append((tap, possible))
    if doubtful:
        # Sizes do not tell, but the first example's outputs have no gradient at the others.
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
    """Run the model once forward and once backward and hand over each layer's gradients as soon as they are there.

    Args:
        run: gives the model's outputs ``(n, c)``; its inputs and parameters carry a graph only if they are to be
            differentiated.
        params: parameters to watch.
        layer_of: the layer of each.
        consume: gets names and per-example gradients of a layer.
        dtype: to compute products in.
        create_graph: make the gradients differentiable.
        batched: take all outputs in one vectorized backward pass, or one after the other.
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
        if some:  # else the outputs do not depend on them
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
            tap.arrived = None  # the graph outlives this pass if it is to be differentiated
    with torch.set_grad_enabled(create_graph):
        for site in list(sites):
            hand_over(site)


@final
class _Tap:
    """A call, and the gradients of its output as they come by."""

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
        """Take the gradient of one output of the model, or batched those of all of them, ``(c, *shape)``."""
        if self.arrived is None:
            return
        if self.current is None and not batched:  # in a vectorized pass: the same for all
            gradient = gradient.expand(self.outputs, *gradient.shape)
        self.gradients[self.current] = gradient
        self.arrived(self)

    def per_example(self, *, weight: bool, bias: bool, dtype: torch.dtype) -> Gradients | None:
        """Return the per-example gradients of the call's parameters; ``None`` if no gradient came by."""
        if self.layout is None or not self.gradients:
            return None
        some = next(iter(self.gradients.values()))
        whole = (
            some
            if None in self.gradients
            else torch.stack([self.gradients.get(k, torch.zeros_like(some)) for k in range(self.outputs)])
        )
        return self.call.gradients(self.layout, whole, weight=weight, bias=bias, dtype=dtype)


@final
class _Identity(torch.autograd.Function):
    """A copy, so that the model may change it in place, whose gradient is shown to the tap."""

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
    """Takes a gradient out of a vectorized backward pass, whole."""

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
