"""Tangent features of a model, seen through products, and the tangent kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Literal, final, overload

import torch
from torch import Tensor, nn

from alignreg import checks
from alignreg.distributed.sharding import is_sharded
from alignreg.sketches import Directions, FactoredDirections, GivenDirections
from alignreg.tangents import graph
from alignreg.tangents.jacobian import JacobianRows, Params
from alignreg.tangents.kernel import factored
from alignreg.tangents.kernel.exact import kernels
from alignreg.tangents.kernel.gradients import gram_of_each, norm_of_each
from alignreg.tangents.kernel.passes import Rules
from alignreg.tangents.kernel.per_example import diagonals
from alignreg.tangents.linearization import Linearization
from alignreg.tangents.live import LiveModel
from alignreg.tangents.progress import bar
from alignreg.tangents.pushforward import pushforward
from alignreg.tangents.switches import eager


@final
class TangentFeatures(LiveModel):
    r"""Tangent features Φ = ∂f/∂w of a live model, and products with them.

    For outputs ``f(x)`` of shape ``(n, c)`` and P parameters w, Φ has n·c rows, row (i, k) = ∇_w f_k(x_i), and the
    tangent kernel is K = ΦΦᵀ, here a tensor ``(n, c, n, c)``, with no 1/n inside (Baratin et al., "Implicit
    Regularization via Neural Feature Alignment", AISTATS 2021, section 2).

    What is differentiated is the model as it would predict now: parameters of this moment, dropout off,
    normalization with its running statistics, no autocast. Modes, buffers, gradients and random states are
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
        with self._linearized(x, create_graph=False) as at:
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

        def gather(rows: Iterator[JacobianRows]) -> Params:
            parts = [part for _, part in rows]
            return {name: torch.cat([part[name] for part in parts]) for name in self._shapes}

        with self._linearized(x, create_graph=create_graph) as at:
            return at.reduce(gather)

    @eager
    def trace(self, x: Any, *, create_graph: bool = False) -> Tensor:
        """Return tr K = ‖Φ‖_F² = Σ_ik ‖∇_w f_k(x_i)‖², exact and uncentered, without holding Φ or K.

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
        with self._linearized(x, create_graph=create_graph) as at:
            parts = diagonals(self._rules(at), norm_of_each)
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
        with self._linearized(x, create_graph=create_graph) as at:
            parts = diagonals(Rules(at, layer_of, self._refused), gram_of_each)
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

        Linear layers, convolutions, embeddings and normalizations go by their factors, without a Jacobian; all other
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
        with self._linearized(x, create_graph=create_graph) as one, ExitStack() as stack:
            two = None if x2 is None else stack.enter_context(self._linearized(x2, create_graph=create_graph))
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
        with self._linearized(x, create_graph=create_graph) as at:
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
        with self._linearized(x, create_graph=create_graph, backward_only=True) as at:
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
        with self._linearized(x, create_graph=create_graph, backward_only=True) as at:
            return at.grams(cotangents)

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        if is_sharded(self.model):
            raise ValueError("outputs: those of a sharded model depend on parameters that are gone. Leave outputs out.")
        return self.parameters

    def _rules(self, at: Linearization) -> Rules:
        return Rules(at, self._layer_of(per_layer=False), self._refused)

    def _layer_of(self, *, per_layer: bool) -> dict[str, str]:
        return {name: layer if per_layer else "" for layer, names in self.layers.items() for name in names}
