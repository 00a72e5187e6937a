"""The model as a function of its parameters at one batch, its Jacobian, and the products of a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from alignreg.checks import deferred
from alignreg.tangents import graph, memory
from alignreg.tangents.agreement import representatives, rounding, tolerance
from alignreg.tangents.batch import Batch, call, map_tensors, size, take, tensors
from alignreg.tangents.finite import NonFiniteGradientError, NonFiniteOutputError, require_finite
from alignreg.tangents.frozen import Frozen, Saved, draws, repeatably
from alignreg.tangents.jacobian import JacobianRows, Params, reduce_jacobian
from alignreg.tangents.primitives import Checkpoints, Primitives
from alignreg.tangents.primitives.precision import rounds_products

ForwardFn = Callable[[nn.Module, Any], Tensor]
T = TypeVar("T")


@final
class Bound(nn.Module):
    """Model and ``forward_fn`` as one module, so that ``functional_call`` reaches through both."""

    def __init__(self, model: nn.Module, forward_fn: ForwardFn | None) -> None:
        super().__init__()
        self.model = model
        self.forward_fn = forward_fn or call

    def forward(self, x: Batch) -> Any:
        """Run ``forward_fn``."""
        return self.forward_fn(self.model, x)


@final
class Linearization:
    """The model as a function of its parameters at one batch, while it is frozen.

    Args:
        bound: the model.
        parameters: those to differentiate with respect to, by name.
        others: the model's other parameters, by name.
        x: the batch.
        inside: the frozen model.
        chunk_size: how many directions or rows go through the model at once; ``None`` for what is quick.
        proven: kinds of self-checks that held before (:func:`.checks.deferred.passes`).
        create_graph: make results differentiable.
        keep_graph: keep the graph of the first forward pass, for pullbacks of the whole batch.
    """

    def __init__(
        self,
        bound: Bound,
        parameters: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
        x: Batch,
        inside: Frozen,
        chunk_size: int | None,
        proven: set[Any],
        *,
        create_graph: bool,
        keep_graph: bool = False,
    ) -> None:
        self.proven = proven
        self.create_graph = create_graph
        # Not around backward passes, whose every step a mode would look at; where rules of layers watch, it is outside.
        self._primitives = partial(Primitives, backward_only=True) if create_graph and keep_graph else nullcontext
        self._bound = bound
        self._inside = inside
        self.chunk_size = chunk_size
        renormed = _renormed(bound.model)
        self.params, self._others = (
            {name: self._primal(p).clone() if name in renormed else self._primal(p) for name, p in some.items()}
            for some in (parameters, others)
        )
        own = {id(p): name for name, p in bound.model.named_parameters()}
        self.x = map_tensors(self._primal, x)
        self._devices = {t.device for t in (*self.params.values(), *tensors(self.x))}
        self.n = size(x)
        # Whether passes must be kept from what the first one did.
        self._draws = self._writes_inputs = self._leaves_traces = False

        leaves = self.leaves()
        saved, checkpoints = Saved(besides=(*self.params.values(), *self._others.values())), Checkpoints()
        copied = map_tensors(torch.clone, self.x)
        parts = tensors(copied)
        versions = [part._version for part in parts]  # noqa: SLF001 - of changes in place
        try:
            with saved.recording(), checkpoints:
                y, self._draws = draws(self.function, leaves, copied, devices=self._devices)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            # The model calls torch.func, which cannot be recorded.
            y, self._draws = draws(self.function, leaves, copied, devices=self._devices)
        self._writes_inputs = versions != [part._version for part in parts]  # noqa: SLF001
        self._leaves_traces = inside.settle()
        self.y = y.detach()
        # Checkpointed modules run again with the model's own parameters, and must save what they saved before.
        self._recomputes = checkpoints.any
        bare = [p for name, p in self._others.items() if others[name].requires_grad and not p.requires_grad]
        if self._recomputes and bare:
            for p in bare:
                p.requires_grad_()
            y = self.function(leaves, self.x)
        self._graph = (leaves, y) if keep_graph else None
        self.c = y.shape[1]
        self.activation_bytes = saved.nbytes
        self.largest_activation_bytes = saved.largest
        # The coarsest precision on the way, a cast inside the model included: the scale of honest rounding.
        nodes = graph.nodes(y)
        dtypes = {y.dtype, *saved.dtypes, *graph.dtypes(nodes), *(p.dtype for p in self.params.values())}
        if torch.float32 in dtypes and any(map(rounds_products, self._devices)):
            dtypes.add(torch.float16)  # which has as many digits as TF32
        self.precision = max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps)
        deferred.require(torch.isfinite(self.y).all(), partial(NonFiniteOutputError, self.c))
        graph.require_recomputable(nodes)
        self.unused = self._unused(y, leaves, own)
        if create_graph:
            graph.require_twice_differentiable(nodes, leaves.values())
        self.vectorizes = not create_graph or graph.vectorizes(nodes)
        self.graph_leaves = graph.leaves_of(nodes)

    def _unused(self, y: Tensor, leaves: Params, names: Mapping[int, str]) -> set[str]:
        """Return which of the parameters the outputs do not depend on.

        Raises:
            ValueError: if there is no other, or the outputs depend on one past the place that it has.
        """
        others = {name: p for name, p in self._others.items() if p.requires_grad}
        used, elsewhere = graph.sources(y, {**leaves, **others})
        held = sorted({names[id(leaf)] for leaf in elsewhere if id(leaf) in names})
        if held:
            raise ValueError(
                f"the model's outputs depend on {held} by something that was made of them before this pass, such as a "
                "cached weight, which has no derivative here. Clear the cache, or let the model compute it in each "
                "forward pass."
            )
        if not used & leaves.keys():
            raise ValueError(
                f"the model's output does not depend on the selected parameters {list(leaves)}: nothing to "
                "differentiate. Does forward_fn detach, or run under no_grad?"
            )
        return leaves.keys() - used

    @property
    def model(self) -> nn.Module:
        """The bare model."""
        return self._bound.model

    @property
    def couples_examples(self) -> bool:
        """Whether the outputs of an example depend on the others of the batch by its statistics, as they are to."""
        return self._inside.couples_examples

    @property
    def gram_dtype(self) -> torch.dtype:
        """The dtype in which products of features are summed: float32 at least."""
        dtype = torch.float32
        for parameter in self.params.values():
            dtype = torch.promote_types(dtype, parameter.dtype)
        return dtype

    @cached_property
    def _working_memory(self) -> int:
        """Bytes that a call may use beyond one forward and backward pass of its batch and its result."""
        return memory.budget(self.y.device, alike=self._inside.over_ranks)

    def fit(self, nbytes: int, *, part: int = 1) -> int:
        """Return how many things of ``nbytes`` fit into one ``part``-th of the working memory: one at least."""
        return max(1, self._working_memory // part // max(1, nbytes))

    def function(self, params: Params, x: Batch) -> Tensor:
        """Return f(x) ``(n, c)`` at the given parameters."""
        # Buffers go in as copies: what a module writes to them in its forward pass is dropped with the copy.
        buffers = {name: buffer.detach().clone() for name, buffer in self._bound.model.named_buffers()}
        state = {f"model.{name}": value for name, value in {**self._others, **buffers, **params}.items()}
        x = map_tensors(torch.clone if self._writes_inputs else _same, x)  # a dict of its own, to take keys out of
        with self._primitives():
            y = (
                repeatably(functional_call, self._bound, state, (x,), devices=self._devices)
                if self._draws
                else functional_call(self._bound, state, (x,))
            )
        if self._leaves_traces:
            self._inside.settle()
        return _checked_output(y, x)

    def reduce(
        self,
        consume: Callable[[Iterator[JacobianRows]], T],
        names: Sequence[str] | None = None,
        *,
        independent: bool = False,
    ) -> T:
        """Return what ``consume`` makes of the rows of the Jacobian, of some parameters or all.

        Args:
            consume: called afresh for every route that is tried.
            names: the parameters.
            independent: refuse a model whose examples depend on each other.
        """
        params = self.params if names is None else {name: self.params[name] for name in names}
        every = self.leaves() if self._recomputes else self.params
        fixed = {name: value for name, value in every.items() if name not in params}

        def function(p: Params, x: Batch) -> Tensor:
            return self.function({**fixed, **p}, x)

        def pullback(u: Tensor) -> Params:
            back = self.pullback(u[None], create_graph=False)
            return {name: back[name][0] for name in params}

        numbers = sum(p.numel() for p in params.values())
        per_row = numbers * self.gram_dtype.itemsize + 2 * self.activation_bytes // self.n
        compute = partial(
            reduce_jacobian,
            function,
            params,
            self.x,
            consume,
            outputs=self.c,
            rows=self.chunk_size or self.fit(per_row, part=32),
            pullback=pullback,
            before_whole_batch=self.require_independent_examples if independent else None,
            whole_batch=self.couples_examples,
            vectorize=self.vectorizes,
            create_graph=self.create_graph,
            precision=self.precision,
        )
        try:
            return compute()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            self.require_repeatable()
            raise

    def require_independent_examples(self) -> None:
        """Check that the outputs of an example do not depend on the others of its batch, unless they are to.

        Raises:
            ValueError: if they do: a kernel between two examples is then not defined.
        """
        if self.couples_examples:
            return
        few = representatives(self.n)[: max(1, self.n - 1)]  # not all: what is the same for every order must change
        orders = (
            torch.arange(self.n, device="cpu"),
            torch.tensor(few, device="cpu").repeat(self.n)[: self.n],
            torch.arange(self.n, device="cpu").flip(0),
        )
        with torch.no_grad():
            noise, *changes = (
                (self.function(self.params, take(self.x, order)) - self.y[order.to(self.y.device)]).abs().double()
                for order in orders
            )
        honest = rounding(self.y, self.y, tolerance(self.precision), self.precision).amax(0)
        if not bool((noise <= honest).all()):
            self.require_repeatable()
        allowed = 2 * noise.amax(0) + honest
        if not all(bool((change <= allowed).all()) for change in changes):
            raise ValueError(
                "the model's outputs for an example depend on the other examples of its batch, so there is no kernel "
                "between examples. Where it normalizes over the batch, use running statistics "
                "(track_running_stats=True), or normalize each example by itself, as GroupNorm does."
            )

    def require_repeatable(self) -> None:
        """Check that the outputs are the same when the model is run again: asked where derivatives disagree.

        Raises:
            ValueError: if they are others.
        """
        deferred.settle()  # outputs that are not finite, say
        with torch.no_grad():
            again = self.function(self.params, self.x)
        if not self.reproduces(again, torch.arange(self.n, device="cpu"), self.y):
            raise ValueError(
                "the model: expected the same outputs whenever it is run on the same inputs, got others. Let it draw "
                "what is random from torch's global state or a torch.Generator that is an attribute of its modules, "
                "which are put back after each pass, and keep no state past a forward pass."
            )

    def reproduces(self, outputs: Tensor, rows: Tensor, spread: Tensor) -> bool:
        """Say whether outputs ``(n, c)`` at the examples ``rows`` are those of this batch, but for rounding.

        Args:
            outputs: of another pass.
            rows: which of its examples this batch has.
            spread: ``(n', c)``, from which the spread of each output over examples is taken.
        """
        difference = (outputs[rows.to(outputs.device)].to(self.y.device) - self.y).abs().double()
        allowed = rounding(self.y, spread, torch.finfo(self.precision).eps ** 0.5, self.precision)
        return bool((difference <= allowed).all())

    def pullback(
        self, cotangents: Tensor, *, create_graph: bool | None = None, examples: slice = slice(None)
    ) -> Params:
        """Return Φᵀω for cotangents ``(m, n, c)``, by parameter name ``(m, *shape)``.

        Args:
            cotangents: Ω.
            create_graph: overrides that of the linearization.
            examples: take only these as the batch.
        """
        create_graph = self.create_graph if create_graph is None else create_graph
        leaves, y = self._graph_of(examples)
        columns = graph.pull(y, leaves, cotangents, create_graph=create_graph)
        require_finite(columns.values())
        return columns

    def grams(self, cotangents: Tensor) -> Params:
        """Return ⟨Φᵀω_a, Φᵀω_b⟩ for cotangents ``(m, n, c)``, by parameter name ``(m, m)``."""
        leaves, y = self._graph_of(slice(None))
        products = graph.grams(y, leaves, cotangents, create_graph=self.create_graph)
        deferred.require(torch.isfinite(torch.stack(list(products.values())).detach()).all(), NonFiniteGradientError)
        return products

    def _graph_of(self, examples: slice) -> tuple[Params, Tensor]:
        if self._graph is not None and examples == slice(None):
            return self._graph
        leaves = self.leaves()
        return leaves, self.function(leaves, map_tensors(lambda t: t[examples], self.x))

    def _primal(self, tensor: Tensor) -> Tensor:
        """Return an alias that the user's hooks on gradients do not see."""
        if tensor.is_inference():
            return tensor.clone()  # made under inference_mode: autograd may not save it
        return tensor.view_as(tensor) if self.create_graph else tensor.detach()

    def leaves(self) -> Params:
        """Return the parameters as tensors that require a gradient, whether they carry a graph or not."""
        return {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in self.params.items()}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _renormed(model: nn.Module) -> set[str]:
    """Return the names of weights that the forward pass changes in place."""
    return {
        f"{path}.weight" if path else "weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    }


def _checked_output(y: Any, x: Batch) -> Tensor:
    n = size(x)
    if not isinstance(y, Tensor):
        called = "model(x)" if isinstance(x, Tensor) else "model(**x)" if isinstance(x, dict) else "model(*x)"
        keys = list(y) if isinstance(y, Mapping) else [0] if isinstance(y, Sequence) else []
        selected = f"[{'logits' if 'logits' in keys else keys[0]!r}]" if keys else ".logits"
        raise TypeError(
            f"the model's output: expected a tensor (n, c), got {type(y).__name__}. "
            f"Select it with forward_fn, as in forward_fn=lambda model, x: {called}{selected}."
        )
    if y.ndim != 2 or y.shape[0] != n or y.shape[1] == 0:
        raise ValueError(
            f"the model's output: expected shape (n, c) = ({n}, number of outputs), got {tuple(y.shape)}. "
            "Bring it to that shape with forward_fn; a single output per example is (n, 1)."
        )
    if not y.is_floating_point():
        raise TypeError(f"the model's output: expected floating-point numbers, got {y.dtype}.")
    return y
