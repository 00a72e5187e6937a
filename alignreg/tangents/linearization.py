"""The model as a function of its parameters at one batch, its Jacobian, and the products of a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial, reduce
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

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
    """The model and ``forward_fn`` as one module, as needed by ``functional_call``."""

    def __init__(self, model: nn.Module, forward_fn: ForwardFn | None) -> None:
        super().__init__()
        self.model = model
        self.forward_fn = forward_fn or call

    @override
    def forward(self, x: Batch) -> Any:
        return self.forward_fn(self.model, x)


@final
class Linearization:
    """The model as a function of its parameters at one batch, while it is frozen.

    Args:
        bound: the model, frozen as ``inside`` describes.
        parameters: the parameters to differentiate with respect to, by name.
        others: the model's other parameters, by name.
        chunk_size: how many directions or rows go through the model at once; ``None`` for a fast choice.
        proven: the kinds of self-checks that have passed (:func:`.checks.deferred.passes`).
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
        # With a kept graph, only forward passes run in this mode, which would slow down every step of a backward pass.
        # Otherwise the caller enters the mode, outside of that of the rules of layers.
        self._primitives = partial(Primitives, backward_only=True) if create_graph and keep_graph else nullcontext
        self._bound = bound
        self._inside = inside
        self.chunk_size = chunk_size
        renormed = _renormed(bound.model)
        self.params, self.others = (
            {name: self._primal(p).clone() if name in renormed else self._primal(p) for name, p in some.items()}
            for some in (parameters, others)
        )
        own = {id(p): name for name, p in bound.model.named_parameters()}
        self.x = map_tensors(self._primal, x)
        self._devices = {t.device for t in (*self.params.values(), *tensors(self.x))}
        self.n = size(x)
        # Side effects of the first pass that later passes must avoid.
        self._draws = self._writes_inputs = self._leaves_traces = False

        leaves = self.leaves()
        saved, checkpoints = Saved(besides=(*self.params.values(), *self.others.values())), Checkpoints()
        copied = map_tensors(torch.clone, self.x)
        parts = tensors(copied)
        versions = [part._version for part in parts]  # noqa: SLF001 - counts changes in place
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
        # Checkpointed modules run again with the model's own parameters, and must then save the same tensors.
        self._recomputes = checkpoints.any
        bare = [p for name, p in self.others.items() if others[name].requires_grad and not p.requires_grad]
        if self._recomputes and bare:
            for p in bare:
                p.requires_grad_()
            y = self.function(leaves, self.x)
        self._graph = (leaves, y) if keep_graph else None
        self.c = y.shape[1]
        self.activation_bytes = saved.nbytes
        self.largest_activation_bytes = saved.largest
        # The coarsest precision in the pass, including casts inside the model, is the scale of rounding errors.
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
        """Return the parameters that the outputs do not depend on, and check that they depend on others."""
        others = {name: p for name, p in self.others.items() if p.requires_grad}
        used, elsewhere = graph.sources(y, {**leaves, **others})
        held = sorted({names[id(leaf)] for leaf in elsewhere if id(leaf) in names})
        if held:
            raise ValueError(
                f"the model's outputs depend on {held} by something that was made of them before this pass, such as a "
                "cached weight, through which they cannot be differentiated. Clear the cache, or let the model compute "
                "it in each forward pass."
            )
        if not used & leaves.keys():
            raise ValueError(
                f"the model's output does not depend on the selected parameters {list(leaves)}, so it cannot be "
                "differentiated. Does forward_fn detach, or run under no_grad?"
            )
        return leaves.keys() - used

    @property
    def model(self) -> nn.Module:
        """The bare model."""
        return self._bound.model

    @property
    def couples_examples(self) -> bool:
        """True if batch statistics make the outputs of an example depend on the others of the batch, by design."""
        return self._inside.couples_examples

    @property
    def gram_dtype(self) -> torch.dtype:
        """The dtype in which products of features are summed: float32 at least."""
        return reduce(torch.promote_types, (p.dtype for p in self.params.values()), torch.float32)

    @cached_property
    def _working_memory(self) -> int:
        return memory.budget(self.y.device, alike=self._inside.over_ranks)

    def fit(self, nbytes: int, *, part: int = 1) -> int:
        """Return how many items of ``nbytes`` fit into one ``part``-th of the working memory; at least one."""
        return max(1, self._working_memory // part // max(1, nbytes))

    def function(self, params: Params, x: Batch) -> Tensor:
        """Return f(x) ``(n, c)`` at the given parameters."""
        # The pass gets copies of the buffers, so that modules write only to copies.
        buffers = {name: buffer.detach().clone() for name, buffer in self._bound.model.named_buffers()}
        state = {f"model.{name}": value for name, value in {**self.others, **buffers, **params}.items()}
        # A new dict in any case, since the model may remove keys from it.
        x = map_tensors(torch.clone if self._writes_inputs else (lambda t: t), x)
        with self._primitives():
            y = (
                repeatably(functional_call, self._bound, state, (x,), devices=self._devices)
                if self._draws
                else functional_call(self._bound, state, (x,))
            )
        if self._leaves_traces:
            self._inside.settle()
        return _checked_output(y, x)

    def reduce_rows(
        self,
        consume: Callable[[Iterator[JacobianRows]], T],
        names: Sequence[str] | None = None,
        *,
        independent: bool = False,
    ) -> T:
        """Return the result of ``consume`` for the rows of the Jacobian, as :func:`.jacobian.reduce_jacobian`.

        ``names`` selects parameters; ``independent`` refuses a model whose examples depend on each other.
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
        try:
            return reduce_jacobian(
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
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            self.require_repeatable()
            raise

    def require_independent_examples(self) -> None:
        """Raise a ``ValueError`` if outputs of an example depend on others, unless batch statistics couple them."""
        if self.couples_examples:
            return
        # Leave out an example, since a dependence on the set of examples would be the same for all their orders.
        few = representatives(self.n)[: max(1, self.n - 1)]
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
        expected = rounding(self.y, self.y, tolerance(self.precision), self.precision).amax(0)
        if not bool((noise <= expected).all()):
            self.require_repeatable()
        allowed = 2 * noise.amax(0) + expected
        if not all(bool((change <= allowed).all()) for change in changes):
            raise ValueError(
                "the model's outputs for an example depend on the other examples of its batch, so there is no kernel "
                "between examples. If it normalizes over the batch, use running statistics (track_running_stats=True), "
                "or normalize each example by itself, as GroupNorm does."
            )

    def require_repeatable(self) -> None:
        """Raise a ``ValueError`` if the outputs change when the model runs again, which explains other failures."""
        deferred.settle()  # an earlier failure, such as outputs that are not finite, comes first
        with torch.no_grad():
            again = self.function(self.params, self.x)
        if not self.reproduces(again, torch.arange(self.n, device="cpu"), self.y):
            raise ValueError(
                "the model: expected the same outputs whenever it is run on the same inputs, got others. Let it draw "
                "random numbers from torch's global state, or from a torch.Generator that is an attribute of a module "
                "(both are restored after each pass), and keep no state from one forward pass to the next."
            )

    def reproduces(self, outputs: Tensor, rows: Tensor, spread: Tensor) -> bool:
        """Return whether ``outputs[rows]`` of another pass equal those of this batch, up to rounding.

        The tolerance depends on the spread of each output over the examples of ``spread`` ``(n', c)``.
        """
        difference = (outputs[rows.to(outputs.device)].to(self.y.device) - self.y).abs().double()
        allowed = rounding(self.y, spread, torch.finfo(self.precision).eps ** 0.5, self.precision)
        return bool((difference <= allowed).all())

    def pullback(
        self, cotangents: Tensor, *, create_graph: bool | None = None, examples: slice = slice(None)
    ) -> Params:
        """Return Φᵀω for cotangents ``(m, n, c)``, by parameter name ``(m, *shape)``.

        ``create_graph`` overrides that of the linearization, and ``examples`` reduces the batch.
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
        """Return an alias that hides this library's passes from the user's hooks on gradients."""
        if tensor.is_inference():
            return tensor.clone()  # autograd cannot save a tensor of inference_mode
        return tensor.view_as(tensor) if self.create_graph else tensor.detach()

    def leaves(self) -> Params:
        """Return the parameters as tensors that require a gradient, with or without a graph."""
        return {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in self.params.items()}


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
            "Reshape it with forward_fn; a single output per example has shape (n, 1)."
        )
    if not y.is_floating_point():
        raise TypeError(
            f"the model's output: expected floating-point numbers, got {y.dtype}. Convert it with forward_fn."
        )
    return y
