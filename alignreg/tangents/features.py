"""Tangent features of a model, seen through products, and the tangent kernel."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from copy import copy
from types import MethodType
from typing import Any, Literal, final, overload

import torch
from torch import Tensor, nn

from alignreg import checks
from alignreg.distributed.sharding import is_sharded
from alignreg.distributed.wrappers import hooks_on_outputs, unwrap
from alignreg.sketches import Directions, FactoredDirections, GivenDirections
from alignreg.tangents import graph, normalization
from alignreg.tangents.agreement import representatives
from alignreg.tangents.batch import as_batch, size, take
from alignreg.tangents.frozen import Frozen, frozen, hooks_on_gradients
from alignreg.tangents.jacobian import Block, Params
from alignreg.tangents.kernel import factored
from alignreg.tangents.kernel.exact import kernels
from alignreg.tangents.kernel.gradients import blocks, norms
from alignreg.tangents.kernel.passes import Rules
from alignreg.tangents.kernel.per_example import diagonals
from alignreg.tangents.linearization import Bound, ForwardFn, Linearization
from alignreg.tangents.normalization import Statistics
from alignreg.tangents.parameters import as_patterns, require_values, select
from alignreg.tangents.primitives import Primitives
from alignreg.tangents.progress import bar
from alignreg.tangents.pushforward import pushforward
from alignreg.tangents.switches import eager


@final
class TangentFeatures:
    r"""Tangent features Φ = ∂f/∂w of a live model, and products with them.

    For outputs ``f(x)`` of shape ``(n, c)`` and P parameters w, Φ has n·c rows, row (i, k) = ∇_w f_k(x_i), and the
    tangent kernel is K = ΦΦᵀ, here a tensor ``(n, c, n, c)``, with no 1/n inside (Baratin et al., "Implicit
    Regularization via Neural Feature Alignment", AISTATS 2021, section 2).

    What is differentiated is the model as it would predict now: parameters of this moment, dropout off,
    normalisation with its running statistics, no autocast. Modes, buffers, gradients and random states are
    the caller's again after every call. Everything works under ``no_grad``, ``inference_mode`` and autocast.

    Of a model under ``fully_shard`` (FSDP2) a call gathers all parameters, so that all ranks must make it together;
    derivatives of the result reach the shards as means over ranks.

    Args:
        model: the model, possibly wrapped (DDP, ``fully_shard``, ``torch.compile``, Accelerate). It is referred to,
            never registered or copied.
        params: glob pattern or patterns of parameter names (``"head.*"``) of the bare model; all trainable
            parameters by default. Tied parameters count once, by their first name.
        forward_fn: ``(model, x) -> (n, c)`` for models whose output is not that tensor, as
            ``lambda model, x: model(**x).logits``.
        chunk_size: how many directions, or rows of the Jacobian, go through the model at once. By default as many as
            are quick and keep the working memory under 2 GiB (on a GPU: half of what is free), beyond a forward and
            backward pass of the batch and the result. It changes no value.
        statistics: with which statistics modules in training mode normalize (``BatchNorm``, and modules of your own
            that have buffers ``running_...``): ``"running"``, those that the model predicts with, or ``"training"``,
            those of the batch as functions of the weights, which is the function that a training step
            differentiates. Modules in evaluation mode have the running ones. Features are then those of the batch
            as one function: the kernel of the batch goes by rows of the whole Jacobian, which is slow.

    Raises:
        TypeError: if the model is sharded otherwise (FSDP1, tensor parallelism), or an argument is of another kind.
        ValueError: if it has no trainable parameter, none that ``params`` matches, or selected ones that are complex or
            without values.

    Example:
        >>> import torch
        >>> from alignreg import TangentFeatures
        >>> features = TangentFeatures(torch.nn.Linear(3, 2))
        >>> x = torch.eye(3)
        >>> features.kernel(x)[:, 0, :, 0]  # ⟨x_i, x_j⟩ from the weight and 1 from the bias
        tensor([[2., 1., 1.],
                [1., 2., 1.],
                [1., 1., 2.]])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        params: str | Sequence[str] | None = None,
        forward_fn: ForwardFn | None = None,
        chunk_size: int | None = None,
        statistics: Statistics = "running",
    ) -> None:
        if chunk_size is not None:
            chunk_size = checks.count("chunk_size", chunk_size)
        if forward_fn is not None:
            checks.function("forward_fn", forward_fn, "(model, x) -> (n, c)")
        bare = unwrap(model)
        patterns = as_patterns(params)
        self._shapes = {name: p.shape for name, p in select(bare, patterns).items()}
        self._patterns = patterns
        self._forward_fn = forward_fn
        self._chunk_size = chunk_size
        checks.choice("statistics", statistics, ("running", "training"))
        self.statistics = statistics
        self.over_ranks = False
        """Whether a ``SyncBatchNorm`` takes the statistics of all ranks, which must then make every call together."""
        self._bound: Bound | None = Bound(bare, forward_fn)
        self._refused: set[str] = set()  # parameters that the model uses otherwise than the rules of layers know
        self._proven: set[Any] = set()  # kinds of self-checks that held
        self._held: tuple[Frozen, dict[str, Any]] | None = None
        self._warned: set[str] = set()
        self._memo: dict[int, Any] | None = None
        self._looks = 0

    @property
    def model(self) -> nn.Module:
        """The bare model."""
        if self._bound is None:
            raise RuntimeError("these tangent features lost their model in pickling: call bind(model) first.")
        if self._memo is not None:
            # Copied before its model was, in one deepcopy that is over by now.
            copied = self._memo.get(id(self._bound.model), self._bound.model)
            self._forward_fn = _copied(self._forward_fn, self._memo)
            self._memo = None
            self._bound = Bound(copied, self._forward_fn)
        return self._bound.model

    @property
    def forward_fn(self) -> ForwardFn | None:
        """The function that makes outputs of the model, if there is one."""
        return self._forward_fn

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters w by name, as they are now."""
        live = dict(self.model.named_parameters())
        changed = [name for name, shape in self._shapes.items() if name not in live or live[name].shape != shape]
        if changed:
            raise RuntimeError(
                f"parameters {changed} of the model were removed or changed shape since it was bound. "
                "Make new tangent features for the changed model."
            )
        require_values(live)
        if self._patterns is None:
            self._notice({name for name, p in live.items() if p.requires_grad} - self._shapes.keys(), "trainable")
        self._notice({name for name in self._shapes if not live[name].requires_grad}, "frozen")
        return {name: live[name] for name in self._shapes}

    def _notice(self, names: set[str], become: str) -> None:
        if names:
            self._warn(
                f"parameters {sorted(names)} have become {become} since the model was bound: "
                f"{'they do not count' if become == 'trainable' else 'they still count'}. Call bind(model) to select "
                "parameters anew."
            )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=4)

    @property
    def like(self) -> Tensor:
        """One of the parameters, without a gradient: for its dtype and device."""
        for name in self._shapes:
            with suppress(AttributeError):
                if not (found := self.model.get_parameter(name)).is_meta:
                    return found.detach()
        return next(iter(self.parameters.values())).detach()  # raises, and says what is missing

    @property
    def num_parameters(self) -> int:
        """P, the length of a tangent feature."""
        return sum(shape.numel() for shape in self._shapes.values())

    @property
    def layers(self) -> dict[str, list[str]]:
        """The names of each layer's parameters; a layer is the path of the module that owns them."""
        owners: dict[str, list[str]] = {}
        for name in self._shapes:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        return owners

    def bind(self, model: nn.Module) -> None:
        """Refer to ``model`` from now on, which must have the same parameters; or select them anew of the same model.

        Raises:
            ValueError: if the selected parameters of another model differ in name or shape.
        """
        bare = unwrap(model)
        shapes = {name: p.shape for name, p in select(bare, self._patterns).items()}
        if shapes != self._shapes and (self._bound is None or bare is not self.model):
            odd = sorted(name for name in shapes.keys() | self._shapes if shapes.get(name) != self._shapes.get(name))
            raise ValueError(f"model: its selected parameters differ from those bound before: {odd}.")
        self._shapes = shapes
        self._bound = Bound(bare, self._forward_fn)
        self._refused = set()
        self._proven = set()
        self._warned = set()
        self._memo = None

    def _rules(self, at: Linearization) -> Rules:
        return Rules(at, self._layer_of(per_layer=False), self._refused)

    def _layer_of(self, *, per_layer: bool) -> dict[str, str]:
        return {name: layer if per_layer else "" for layer, names in self.layers.items() for name in names}

    def __deepcopy__(self, memo: dict[int, Any]) -> TangentFeatures:
        # A copy of what watches the model watches the same live model, unless the model is being copied along: before,
        # or after, which shows at the first use.
        bound = None if self._bound is None else Bound(self.model, self._forward_fn)
        copied = copy(self)
        own = {"_refused": set(self._refused), "_proven": set(self._proven), "_warned": set(self._warned)}
        copied.__dict__.update(own, _bound=bound, _memo=memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None, "_memo": None, "_held": None}

    def leaves(self, x: Any) -> list[Tensor]:
        """Return the leaves, parameters mostly, that the outputs at a batch depend on, where gradients may flow to."""
        with self._evaluation(x, create_graph=True, backward_only=True) as at:
            return at.graph_leaves

    def require_independent_examples(self, x: Any) -> None:
        """Check that the outputs of an example do not depend on the others of its batch.

        Raises:
            ValueError: if they do.
        """
        with self._evaluation(x, create_graph=False) as at:
            at.require_independent_examples()

    @contextmanager
    def held(self, *, detached: bool) -> Iterator[dict[int, Tensor]]:
        """Make all calls inside the block, and backward passes through their results, of the model as it is now.

        Args:
            detached: differentiate with respect to detached aliases of the parameters, by whose ``id`` the parameters
                are yielded. What hangs on the parameters themselves (hooks, caches) does not see these passes, and is
                to be handed the gradients of the aliases.
        """
        own = dict(self.model.named_parameters())
        require_values(own)
        with self._frozen() as inside:
            own = dict(self.model.named_parameters())  # those of a sharded model are whole by now
            aliases = {name: p.detach().requires_grad_(p.requires_grad) for name, p in own.items()} if detached else own
            self._held = inside, aliases
            try:
                yield {id(aliases[name]): p for name, p in own.items()}
            finally:
                self._held = None

    @eager
    def outputs(self, x: Any) -> Tensor:
        """Return f(x) ``(n, c)``: the outputs that are differentiated, without a gradient history.

        Args:
            x: tensor, tuple or dict of tensors with the n examples on axis 0.

        Raises:
            TypeError: if ``x`` or the output is not made of tensors.
            ValueError: if ``x`` is empty, or the output not a finite ``(n, c)`` that depends on the parameters.

        Example:
            >>> import torch
            >>> from alignreg import TangentFeatures
            >>> TangentFeatures(torch.nn.Linear(3, 2)).outputs(torch.ones(4, 3)).shape
            torch.Size([4, 2])
        """
        with self._evaluation(x, create_graph=False) as at:
            return at.y

    @eager
    def jacobian(self, x: Any, *, create_graph: bool = False) -> dict[str, Tensor]:
        """Return Φ itself, by parameter name: ``(n, c, *shape)`` each.

        Its n·c·P numbers are the result; for the kernel or the trace alone, :meth:`kernel` and :meth:`trace` take
        less.

        Args:
            x: tensor, tuple or dict of tensors with the n examples on axis 0.
            create_graph: make the result differentiable.

        Raises:
            TypeError: if ``x`` or the output is not made of tensors.
            ValueError: if ``x`` is empty, or the output not a finite ``(n, c)``.

        Example:
            >>> import torch
            >>> from alignreg import TangentFeatures
            >>> TangentFeatures(torch.nn.Linear(3, 2)).jacobian(torch.ones(4, 3))["weight"].shape
            torch.Size([4, 2, 2, 3])
        """

        def gather(blocks: Iterator[Block]) -> Params:
            parts = [block for _, block in blocks]
            return {name: torch.cat([part[name] for part in parts]) for name in self._shapes}

        with self._evaluation(x, create_graph=create_graph) as at:
            return at.reduce(gather)

    @eager
    def trace(self, x: Any, *, create_graph: bool = False) -> Tensor:
        """Return tr K = ‖Φ‖_F² = Σ_ik ‖∇_w f_k(x_i)‖², exact and uncentred, without holding Φ or K.

        Of a model whose examples depend on each other it is that of the batch as one function.

        Args:
            x: tensor, tuple or dict of tensors with the n examples on axis 0.
            create_graph: make the result differentiable.

        Raises:
            TypeError: as :meth:`jacobian`.
            ValueError: as :meth:`jacobian`.

        Example:
            >>> import torch
            >>> from alignreg import TangentFeatures
            >>> TangentFeatures(torch.nn.Linear(3, 2)).trace(torch.eye(3))
            tensor(12.)
        """
        with self._evaluation(x, create_graph=create_graph) as at:
            parts = diagonals(self._rules(at), norms)
            total: Tensor = torch.stack([part.sum(dtype=torch.float64) for part in parts.values()]).sum()
            return total.to(at.gram_dtype)

    @overload
    def diagonal(self, x: Any, *, per_layer: Literal[False] = False, create_graph: bool = False) -> Tensor: ...

    @overload
    def diagonal(self, x: Any, *, per_layer: Literal[True], create_graph: bool = False) -> dict[str, Tensor]: ...

    @eager
    def diagonal(self, x: Any, *, per_layer: bool = False, create_graph: bool = False) -> Tensor | dict[str, Tensor]:
        """Return the diagonal blocks K[i, :, i, :] of the exact tangent kernel, without the rest of it.

        The block of an example is the Gram matrix of its outputs' gradients, ⟨∇_w f_k(x_i), ∇_w f_l(x_i)⟩. Of a model
        whose examples depend on each other it is that of the batch as one function.

        Args:
            x: tensor, tuple or dict of tensors with the n examples on axis 0.
            per_layer: return the blocks of each layer's own parameters, which sum to the blocks of K.
            create_graph: make the result differentiable.

        Returns:
            ``(n, c, c)``, or a dict of them by layer.

        Raises:
            TypeError: as :meth:`jacobian`.
            ValueError: as :meth:`jacobian`.

        Example:
            >>> import torch
            >>> from alignreg import TangentFeatures
            >>> TangentFeatures(torch.nn.Linear(3, 2)).diagonal(torch.eye(3))[0]
            tensor([[2., 0.],
                    [0., 2.]])
        """
        layer_of = self._layer_of(per_layer=checks.flag("per_layer", per_layer))
        with self._evaluation(x, create_graph=create_graph) as at:
            parts = diagonals(Rules(at, layer_of, self._refused), blocks)
        by_layer: dict[str, list[Tensor]] = {layer: [] for layer in layer_of.values()}
        for names, part in parts.items():
            by_layer[layer_of[names[0]]].append(part)
        found = {layer: torch.stack(value).sum(0) for layer, value in by_layer.items()}
        return found if per_layer else found[""]

    @overload
    def kernel(
        self,
        x: Any,
        x2: Any = None,
        *,
        per_layer: Literal[False] = False,
        create_graph: bool = False,
        progress: bool = False,
    ) -> Tensor: ...

    @overload
    def kernel(
        self, x: Any, x2: Any = None, *, per_layer: Literal[True], create_graph: bool = False, progress: bool = False
    ) -> dict[str, Tensor]: ...

    @eager
    def kernel(
        self, x: Any, x2: Any = None, *, per_layer: bool = False, create_graph: bool = False, progress: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """Return the exact tangent kernel K[i, k, j, l] = ⟨∇_w f_k(x_i), ∇_w f_l(x2_j)⟩.

        Linear layers, convolutions, embeddings and normalisations go by their factors, without a Jacobian; all other
        parameters by theirs, in pieces that fit in memory. Every call checks itself, layer by layer: ωᵀK_l ω' against
        ⟨Φ_lᵀω, Φ_lᵀω'⟩ for random ω, ω'. A layer whose factors fail goes the other way, with one warning.
        Half-precision models give a float32 kernel.

        Args:
            x: tensor, tuple or dict of tensors with the n examples on axis 0.
            x2: another batch of n2 examples; ``x`` by default.
            per_layer: return the kernel of each layer's own parameters, which sum to K.
            create_graph: make the result differentiable; then what the layers hold stays in memory.
            progress: show a progress bar (needs the package rich).

        Returns:
            ``(n, c, n2, c)``, or a dict of them by layer (path of the module that owns the parameters).

        Raises:
            TypeError: as :meth:`jacobian`.
            ValueError: as :meth:`jacobian`, and if the outputs of an example depend on the others of its batch.
            RuntimeError: if the kernel fails its self-check.
            ImportError: if ``progress`` is asked for and rich is missing.

        Example:
            >>> import torch
            >>> from alignreg import TangentFeatures
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
            >>> features = TangentFeatures(net)
            >>> x = torch.randn(5, 3)
            >>> layers = features.kernel(x, per_layer=True)
            >>> list(layers), torch.allclose(sum(layers.values()), features.kernel(x), atol=1e-5)
            (['0', '2'], True)
        """
        layer_of = self._layer_of(per_layer=checks.flag("per_layer", per_layer))
        checks.flag("progress", progress)
        with self._evaluation(x, create_graph=create_graph) as one, ExitStack() as stack:
            two = None if x2 is None else stack.enter_context(self._evaluation(x2, create_graph=create_graph))
            tick = stack.enter_context(bar("tangent kernel", self.num_parameters, show=progress))
            found = kernels(Rules(one, layer_of, self._refused), two, tick)
        return found if per_layer else found[""]

    @eager
    def pushforward(
        self, x: Any, directions: Mapping[str, Tensor] | Directions, *, create_graph: bool = False
    ) -> Tensor:
        """Return ΦS: the derivative of every output along m directions of parameter space.

        One forward-mode product per direction, several at a time. Where torch has no forward-mode derivative (modules
        under activation checkpointing, custom autograd functions), the same by two reverse-mode passes.

        Args:
            x: tensor, tuple or dict of tensors with the n examples on axis 0.
            directions: S, as tensors ``(m, *shape)`` by parameter name, or a lazy sketch that draws them
                (:func:`alignreg.sketches.gaussian`). No 1/√m is applied.
            create_graph: make the result differentiable.

        Returns:
            ``(n, c, m)``.

        Raises:
            TypeError: as :meth:`jacobian`.
            ValueError: as :meth:`jacobian`, and if the directions do not fit the parameters.
            RuntimeError: if the model can be differentiated neither forward nor twice; names the module.

        Example:
            >>> import torch
            >>> from alignreg import TangentFeatures, sketches
            >>> features = TangentFeatures(torch.nn.Linear(3, 2))
            >>> features.pushforward(torch.ones(4, 3), sketches.gaussian(16, seed=0)).shape
            torch.Size([4, 2, 16])
        """
        lazy = GivenDirections(directions, self._shapes) if isinstance(directions, Mapping) else directions
        if not hasattr(lazy, "block"):
            raise TypeError(
                f"directions: expected tensors by parameter name or a sketch, got {type(directions).__name__}. Draw "
                "them with sketches.gaussian(m, seed)."
            )
        with self._evaluation(x, create_graph=create_graph) as at:
            if isinstance(lazy, FactoredDirections):
                return factored.features(self._rules(at), lazy)
            return pushforward(at, lazy)

    @eager
    def pullback(
        self, x: Any, cotangents: Tensor, *, outputs: Tensor | None = None, create_graph: bool = False
    ) -> dict[str, Tensor]:
        """Return Φᵀω for m cotangents ω on the outputs: one backward pass each, after one forward pass.

        Args:
            x: tensor, tuple or dict of tensors with the n examples on axis 0.
            cotangents: Ω, ``(m, n, c)``.
            outputs: f(x) ``(n, c)`` of a forward pass of yours, whose graph is then taken and kept instead of one of
                our own. Whether it is that of the same function, see :meth:`agree`, is left to you.
            create_graph: make the result differentiable.

        Returns:
            By parameter name, ``(m, *shape)``.

        Raises:
            TypeError: as :meth:`jacobian`.
            ValueError: as :meth:`jacobian`, and if the cotangents do not fit the output.

        Example:
            >>> import torch
            >>> from alignreg import TangentFeatures
            >>> features = TangentFeatures(torch.nn.Linear(3, 2))
            >>> features.pullback(torch.ones(4, 3), torch.ones(1, 4, 2))["bias"]
            tensor([[4., 4.]])
        """
        cotangents = checks.real("cotangents", cotangents)
        if outputs is not None:
            checks.dense("outputs", outputs)
            return graph.pull(outputs, self._own_parameters(), cotangents, create_graph=create_graph)
        with self._evaluation(x, create_graph=create_graph, backward_only=True) as at:
            return at.pullback(cotangents)

    @eager
    def grams(
        self, x: Any, cotangents: Tensor, *, outputs: Tensor | None = None, create_graph: bool = False
    ) -> dict[str, Tensor]:
        """Return ω_aᵀK_wω_b = ⟨Φ_wᵀω_a, Φ_wᵀω_b⟩ of each parameter w alone, for m cotangents ω on the outputs.

        The products of the pullbacks (:func:`alignreg.estimators.gram`), which sum to ω_aᵀKω_b; of linear layers they
        come without the pullbacks where that is less work, as for the few examples of an MLP.

        Args:
            x: as in :meth:`pullback`.
            cotangents: as in :meth:`pullback`.
            outputs: as in :meth:`pullback`.
            create_graph: make the result differentiable.

        Returns:
            By parameter name, ``(m, m)``, in float32 at least.

        Raises:
            TypeError: as :meth:`jacobian`.
            ValueError: as :meth:`pullback`.

        Example:
            >>> import torch
            >>> from alignreg import TangentFeatures
            >>> features = TangentFeatures(torch.nn.Linear(3, 2))
            >>> features.grams(torch.ones(4, 3), torch.ones(1, 4, 2))
            {'weight': tensor([[96.]]), 'bias': tensor([[32.]])}
        """
        cotangents = checks.real("cotangents", cotangents)
        if outputs is not None:
            checks.dense("outputs", outputs)
            return graph.grams(outputs, self._own_parameters(), cotangents, create_graph=create_graph)
        with self._evaluation(x, create_graph=create_graph, backward_only=True) as at:
            return at.grams(cotangents)

    @eager
    def agree(self, x: Any, outputs: Tensor) -> bool:
        """Say whether ``outputs`` of a forward pass of yours can stand for those that are differentiated here.

        They cannot where dropout is on, normalization takes other statistics than here or autocast rounds, for which
        they are compared, output by output, at the first, the last and a random example (all of them where the batch
        is normalized by its own statistics); nor where attention, recurrent layers or compiled parts ran in kernels
        that are differentiated once only, where their graph does not lead to the parameters, as that of a copy of the
        model or past a ``detach``, or where hooks on gradients are in it.

        Args:
            x: tensor, tuple or dict of tensors with the n examples on axis 0.
            outputs: ``(n, c)``.

        Raises:
            TypeError: as :meth:`outputs`.
            ValueError: as :meth:`outputs`.

        Example:
            >>> import torch
            >>> from alignreg import TangentFeatures
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(), torch.nn.Linear(8, 2))
            >>> x = torch.randn(5, 3)
            >>> TangentFeatures(net).agree(x, net(x)), TangentFeatures(net.eval()).agree(x, net(x))
            (False, True)
        """
        batch, outputs = as_batch(x), checks.dense("outputs", outputs)
        n = size(batch)
        if outputs.ndim != 2 or len(outputs) != n or not self.serves(outputs):
            return False
        rows = torch.tensor(representatives(n, seed=self._looks), device="cpu")
        if self.couples_examples:
            rows = torch.randperm(n, generator=torch.Generator().manual_seed(self._looks), device="cpu")
        self._looks += 1
        with self._evaluation(take(batch, rows), create_graph=False) as at:
            if outputs.shape[1:] != at.y.shape[1:] or outputs.dtype != at.y.dtype:
                return False
            # Not all parameters: a few examples use some of the experts that a batch does.
            return at.params.keys() - at.unused <= self.reached(outputs) and at.reproduces(
                outputs.detach(), rows, outputs
            )

    def serves(self, outputs: Tensor) -> bool:
        """Say whether the graph of ``outputs`` can be differentiated twice, and has no hooks on gradients in it."""
        hooked = hooks_on_gradients(self.model) or hooks_on_outputs(outputs)
        return not hooked and graph.twice_differentiable(outputs)

    def reached(self, outputs: Tensor) -> set[str]:
        """Return the names of the parameters that the graph of ``outputs`` leads to."""
        return graph.sources(outputs, {name: p for name, p in self.parameters.items() if p.requires_grad})[0]

    @property
    def couples_examples(self) -> bool:
        """Whether, in the present modes, outputs of an example depend on the others of its batch by its statistics."""
        return self.statistics == "training" and any(map(normalization.couples_examples, self.model.modules()))

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        if is_sharded(self.model):
            raise ValueError("outputs: those of a sharded model depend on parameters that are gone. Leave outputs out.")
        return self.parameters

    def _frozen(self) -> AbstractContextManager[Frozen]:
        return frozen(self.model, statistics=self.statistics, over_ranks=self.over_ranks)

    @contextmanager
    def _evaluation(self, x: Any, *, create_graph: bool, backward_only: bool = False) -> Iterator[Linearization]:
        model = self.model
        batch = as_batch(x)
        checks.flag("create_graph", create_graph)
        selected = self.parameters
        with ExitStack() as stack:
            if self._held is not None:
                inside, every = self._held
                stack.enter_context(torch.enable_grad())
            else:
                inside = stack.enter_context(self._frozen())
                every = dict(model.named_parameters())
            if create_graph and not backward_only:
                stack.enter_context(Primitives())
            assert self._bound is not None
            evaluation = Linearization(
                self._bound,
                {name: every[name] for name in selected},
                {name: p for name, p in every.items() if name not in selected},
                batch,
                inside,
                self._chunk_size,
                self._proven,
                create_graph=create_graph,
                keep_graph=backward_only,
            )
            self._notice_unused(evaluation.unused)
            yield evaluation

    def _notice_unused(self, names: set[str]) -> None:
        kinds = {re.sub(r"\d+", "", name) for name in self._shapes.keys() - names}
        # Of experts, say, some are used and some are not.
        if odd := sorted(name for name in names if re.sub(r"\d+", "", name) not in kinds):
            self._warn(
                f"the model's outputs do not depend on {odd}, whose features are zero. That is as it should be for "
                "layers that these outputs do not use, as the pooler of an encoder; it is not for weights whose "
                "place something else holds, such as merged adapters or a weight that is cached in evaluation mode."
            )


def _copied(fn: ForwardFn | None, memo: Mapping[int, Any]) -> ForwardFn | None:
    """Return what a deepcopy made of a function: of a method, that of the copied object, if there is one."""
    if isinstance(fn, MethodType):
        return MethodType(fn.__func__, memo.get(id(fn.__self__), fn.__self__))
    copied: ForwardFn | None = memo.get(id(fn), fn)
    return copied
