"""Tangent features of a model, by products with them, and the tangent kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Literal, final, overload

import torch
from torch import Tensor, nn

from alignreg import checks
from alignreg.distributed.sharding import is_sharded
from alignreg.sketches import Directions, GivenDirections
from alignreg.tangents import graph
from alignreg.tangents.jacobian import JacobianRows, Params
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

    For outputs ``f(x)`` of shape ``(n, c)`` and P parameters w, Φ has n·c rows, row (i, k) = ∇_w f_k(x_i). The tangent
    kernel is K = ΦΦᵀ, here a tensor ``(n, c, n, c)`` without a factor 1/n (Baratin et al., "Implicit Regularization
    via Neural Feature Alignment", AISTATS 2021, section 2).

    Each call differentiates the model as it would predict now: with its present parameters, without dropout and
    autocast, and with running statistics in normalizations. After the call, modes, buffers, gradients and random states
    are as before. Everything works under ``no_grad``, ``inference_mode`` and autocast. For a model under
    ``fully_shard`` (FSDP2) a call gathers all parameters, so all ranks must make it together; derivatives of the result
    reach the shards as means over ranks.

    **Methods** have these arguments and errors in common. ``x`` is a batch of n examples: a tensor, or a tuple or dict
    of tensors with the examples on axis 0. ``create_graph=True`` makes the result differentiable. A ``TypeError`` is
    raised if ``x`` or the model's output is not made of tensors, and a ``ValueError`` if ``x`` is empty, or the output
    is not a finite ``(n, c)`` that depends on the parameters.

    Args:
        model: the model, possibly wrapped (DDP, ``fully_shard``, ``torch.compile``, Accelerate). The tangent features
            refer to it, and never register or copy it.
        params: glob pattern or patterns of parameter names (``"head.*"``) of the bare model; all trainable
            parameters by default. Tied parameters count once, under their first name.
        forward_fn: ``(model, x) -> (n, c)`` for models with another output, such as
            ``lambda model, x: model(**x).logits``.
        chunk_size: how many directions, or rows of the Jacobian, go through the model at once; it changes no value. By
            default as many as are fast and keep the working memory under 2 GiB (on a GPU: half of the free memory), in
            addition to one forward and backward pass of the batch and the result.
        statistics: the statistics by which modules in training mode normalize (``BatchNorm``, and your own modules with
            buffers ``running_...``): ``"running"`` (those of predictions) or ``"training"`` (those of the batch, as
            functions of the weights, as in a training step). Modules in evaluation mode always use running statistics.
            With batch statistics, the features are those of the whole batch as one function, and the kernel is computed
            from rows of the whole Jacobian, which is slow.

    Raises:
        TypeError: if the model is sharded other than by ``fully_shard`` (FSDP1, tensor parallelism), or an argument has
            the wrong type.
        ValueError: if the model has no trainable parameter, none matches ``params``, or selected parameters are complex
            or have no values.

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
        """Return f(x) ``(n, c)``, the outputs that are differentiated, without a gradient history.

        Example:
            >>> TangentFeatures(torch.nn.Linear(3, 2)).outputs(torch.ones(4, 3)).shape
            torch.Size([4, 2])
        """
        with self._linearized(x, create_graph=False) as at:
            return at.y

    @eager
    def jacobian(self, x: Any, *, create_graph: bool = False) -> dict[str, Tensor]:
        """Return Φ itself, by parameter name ``(n, c, *shape)``.

        The result holds n·c·P numbers; :meth:`kernel` and :meth:`trace` need less memory.

        Example:
            >>> TangentFeatures(torch.nn.Linear(3, 2)).jacobian(torch.ones(4, 3))["weight"].shape
            torch.Size([4, 2, 2, 3])
        """

        def gather(rows: Iterator[JacobianRows]) -> Params:
            parts = [part for _, part in rows]
            return {name: torch.cat([part[name] for part in parts]) for name in self._shapes}

        with self._linearized(x, create_graph=create_graph) as at:
            return at.reduce_rows(gather)

    @eager
    def trace(self, x: Any, *, create_graph: bool = False) -> Tensor:
        """Return tr K = ‖Φ‖_F² = Σ_ik ‖∇_w f_k(x_i)‖², exact and uncentered, without storing Φ or K.

        If examples interact (batch statistics), this is the trace of the whole batch as one function.

        Example:
            >>> TangentFeatures(torch.nn.Linear(3, 2)).trace(torch.eye(3))
            tensor(12.)
        """
        with self._linearized(x, create_graph=create_graph) as at:
            parts = diagonals(self._rules(at, per_layer=False), norm_of_each)
            total: Tensor = torch.stack([part.sum(dtype=torch.float64) for part in parts.values()]).sum()
            return total.to(at.gram_dtype)

    @overload
    def diagonal(self, x: Any, *, per_layer: Literal[False] = False, create_graph: bool = False) -> Tensor: ...

    @overload
    def diagonal(self, x: Any, *, per_layer: Literal[True], create_graph: bool = False) -> dict[str, Tensor]: ...

    @eager
    def diagonal(self, x: Any, *, per_layer: bool = False, create_graph: bool = False) -> Tensor | dict[str, Tensor]:
        """Return the part K[i, :, i, :] ``(n, c, c)`` of the exact tangent kernel, without computing the rest.

        For each example it is the Gram matrix of the gradients of its outputs, ⟨∇_w f_k(x_i), ∇_w f_l(x_i)⟩. If
        examples interact (batch statistics), the gradients are those of the whole batch as one function. With
        ``per_layer``, the result is a dict of the same parts of the layers' own kernels, which sum to those of K.

        Example:
            >>> TangentFeatures(torch.nn.Linear(3, 2)).diagonal(torch.eye(3))[0]
            tensor([[2., 0.],
                    [0., 2.]])
        """
        checks.flag("per_layer", per_layer)
        with self._linearized(x, create_graph=create_graph) as at:
            rules = self._rules(at, per_layer=per_layer)
            parts = diagonals(rules, gram_of_each)
        by_layer: dict[str, list[Tensor]] = {layer: [] for layer in rules.layer_of.values()}
        for names, part in parts.items():
            by_layer[rules.layer_of[names[0]]].append(part)
        sums = {layer: torch.stack(value).sum(0) for layer, value in by_layer.items()}
        return sums if per_layer else sums[""]

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
        """Return the exact tangent kernel K[i, k, j, l] = ⟨∇_w f_k(x_i), ∇_w f_l(x2_j)⟩ ``(n, c, n2, c)``.

        The kernel of linear layers, convolutions, embeddings and normalizations is computed from factors, without a
        Jacobian. That of all other parameters is computed from their Jacobian, in pieces that fit in memory. Every call
        checks itself, layer by layer: ωᵀK_l ω' is compared with ⟨Φ_lᵀω, Φ_lᵀω'⟩ for random ω, ω'. A layer whose factors
        fail the check is computed from its Jacobian, with one warning. The kernel of half-precision models is float32.

        Args:
            x: the batch.
            x2: another batch of n2 examples; ``x`` by default.
            per_layer: return a dict with the kernel of each layer's own parameters, by the path of the module that owns
                the parameters. These kernels sum to K.
            create_graph: make the result differentiable; intermediate values of the layers then stay in memory.
            progress: show a progress bar (needs the package rich).

        Raises:
            ValueError: if the outputs of an example depend on the other examples of its batch.
            RuntimeError: if the kernel fails its self-check.
            ImportError: if ``progress`` is requested and rich is missing.

        Example:
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
            >>> features = TangentFeatures(net)
            >>> x = torch.randn(5, 3)
            >>> layers = features.kernel(x, per_layer=True)
            >>> list(layers), torch.allclose(sum(layers.values()), features.kernel(x), atol=1e-5)
            (['0', '2'], True)
        """
        checks.flag("per_layer", per_layer)
        checks.flag("progress", progress)
        with self._linearized(x, create_graph=create_graph) as one, ExitStack() as stack:
            two = None if x2 is None else stack.enter_context(self._linearized(x2, create_graph=create_graph))
            tick = stack.enter_context(bar("tangent kernel", self.num_parameters, show=progress))
            by_layer = kernels(self._rules(one, per_layer=per_layer), two, tick)
        return by_layer if per_layer else by_layer[""]

    @eager
    def pushforward(
        self, x: Any, directions: Mapping[str, Tensor] | Directions, *, create_graph: bool = False
    ) -> Tensor:
        """Return ΦS ``(n, c, m)``, the derivative of every output along m directions in parameter space.

        There is one forward-mode product per direction, several at a time. Where torch has no forward-mode derivative
        (modules under activation checkpointing, custom autograd functions), two reverse-mode passes replace it.

        Args:
            x: the batch.
            directions: S, as tensors ``(m, *shape)`` by parameter name, or a lazy sketch that draws them
                (:func:`alignreg.sketches.gaussian`). No factor 1/√m is applied.
            create_graph: make the result differentiable.

        Raises:
            ValueError: if the directions do not fit the parameters.
            RuntimeError: if the model can be differentiated neither forward nor twice; the message names the module.

        Example:
            >>> from alignreg import sketches
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
            return pushforward(self._rules(at, per_layer=False), lazy)

    @eager
    def pullback(
        self, x: Any, cotangents: Tensor, *, outputs: Tensor | None = None, create_graph: bool = False
    ) -> dict[str, Tensor]:
        """Return Φᵀω ``(m, *shape)`` by parameter name for m cotangents ω on the outputs.

        One forward pass is followed by one backward pass for each cotangent.

        Args:
            x: the batch.
            cotangents: Ω ``(m, n, c)``.
            outputs: f(x) ``(n, c)`` of your own forward pass, whose graph is used and kept, instead of another pass.
                You must know that it belongs to the same function; :meth:`agree` checks that.
            create_graph: make the result differentiable.

        Raises:
            ValueError: if the cotangents do not fit the output.

        Example:
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
        """Return ω_aᵀK_wω_b = ⟨Φ_wᵀω_a, Φ_wᵀω_b⟩ ``(m, m)`` for each parameter w by name, in float32 at least.

        These products of the pullbacks (:func:`alignreg.estimators.gram`) sum to ω_aᵀKω_b. For linear layers they are
        computed without the pullbacks where that is less work, as for a few examples of an MLP. Arguments and errors
        are those of :meth:`pullback`.

        Example:
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
            raise ValueError(
                "outputs: expected None for a sharded model, got a tensor, whose graph leads to gathered parameters "
                "that no longer exist. Leave outputs out."
            )
        return self.parameters

    def _rules(self, at: Linearization, *, per_layer: bool) -> Rules:
        layer_of = {name: layer if per_layer else "" for layer, names in self.layers.items() for name in names}
        return Rules(at, layer_of, self._refused)
