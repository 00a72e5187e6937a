"""The base class of losses on tangent features, which decides when, how strongly and to which examples each applies."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from typing_extensions import override

from alignreg import checks, sketches
from alignreg.checks import deferred
from alignreg.checks.deferred import Deferred, SelfCheckError
from alignreg.distributed.sharding import is_sharded, ranks_of
from alignreg.distributed.wrappers import find_ddp, rank, require_sync, world_size
from alignreg.losses.count import Count
from alignreg.losses.gradients import clipped_share, with_gradients
from alignreg.losses.reference import Reference
from alignreg.losses.reuse import Reuse
from alignreg.losses.sample import Sample, UndefinedLossError, check_outputs, check_targets
from alignreg.tangents import TangentFeatures, graph
from alignreg.tangents.batch import Batch, as_inputs, on, size, slice_examples, take
from alignreg.tangents.finite import NonFiniteGradientError, NonFiniteOutputError, require_finite
from alignreg.tangents.linearization import ForwardFn
from alignreg.tangents.normalization import Statistics
from alignreg.tangents.primitives import is_checkpointed
from alignreg.tangents.switches import eager
from alignreg.targets import encode

Weight = float | Callable[[int], float]
"""A factor, or a schedule: the factor at an optimizer step."""


class TangentLoss(nn.Module, ABC):
    r"""A term on the tangent features of the live model, to be added to a training loss.

    ``reg(x, y)`` is a differentiable scalar. It needs no prediction of the model: it runs the bare module itself, in
    full precision and without dropout. Modules in training mode that normalize by batch statistics (``BatchNorm``) use
    the statistics of the loss's examples, as functions of the weights, so that the loss differentiates the function
    being trained. Running statistics do not change. The gradient is computed in the call, under these same conditions,
    and handed over in ``backward()``, so that checkpointed modules are recomputed without dropout and autocast. There
    are no second derivatives. The loss refers to the model without registering it: ``parameters()`` is empty, and
    ``state_dict()`` holds only the step.

    The loss **counts its calls in training mode**: ``gradient_accumulation_steps`` calls make one optimizer step.
    Random numbers follow from (seed, call, rank), never from torch's global random state. When the loss does not apply
    (``eval()``, weight zero, a step that is skipped), it is exactly zero, and still differentiable.

    Under DDP each rank evaluates its own examples, and DDP averages the gradients, provided that this loss and the
    task's loss are differentiated in **one** ``backward()``. Pass the wrapped model, before its first forward pass:
    any other use then raises an error in ``backward()`` instead of letting the replicas drift apart. A forward hook on
    the wrapper checks this; it sees only outputs that are tensors or built from tensors.

    Under ``fully_shard`` (FSDP2) each evaluation gathers all parameters at once and gives the shards the mean gradient
    over the ranks, in any backward pass. All ranks must call the loss equally often.

    Args:
        model: the model, possibly wrapped (DDP, ``fully_shard``, ``torch.compile``, Accelerate).
        weight: factor of the loss, ≥ 0, or a schedule (a function of the optimizer step). ``None`` means the default
            of the loss, a starting point for networks of moderate size.
        examples: how many examples of a batch to use, drawn uniformly; ``None`` for all.
        every_n_steps: apply the loss at every n-th optimizer step, with n times the weight; its mean over the steps
            stays the same.
        gradient_accumulation_steps: how many calls make an optimizer step. Divide the sum of both losses by this
            number, as usual.
        seed: seed of all random numbers.
        centered: center the kernel over the examples. Targets are always centered.
        per_layer: average the losses of the kernels of the individual layers, leaving out layers without a loss.
        sync: with several processes, compute the loss of all their examples together.
        statistics: the statistics by which modules in training mode normalize: ``"training"`` (those of the loss's
            examples) or ``"running"`` (those of predictions). Training does not keep running statistics in step with
            the weights, so ``"running"`` may ruin a network with ``BatchNorm`` (docs/losses.md).
        on_nonfinite: what to do when outputs or gradients contain NaN or inf: ``"raise"`` an error, or ``"skip"`` the
            step, which then counts with a loss of zero and warns once.
        clip: the largest allowed length of the weighted gradient, relative to the length of the weights. A longer
            gradient is scaled down, with one warning. Gradients are far shorter in healthy training, but may be many
            times as long in the first steps of a deep network with ``BatchNorm``. ``None`` never clips.
        params: glob pattern or patterns of the parameters whose tangent features count; all trainable parameters by
            default. Gradients flow to everything that these features depend on.
        forward_fn: ``(model, x) -> (n, c)``, for models with another output.

    Raises:
        TypeError: if the model is sharded other than by ``fully_shard``.
        ValueError: if an argument is out of range, or the model has no trainable parameter.
    """

    step: Tensor
    default_weight: ClassVar[float]
    caution: ClassVar[str] = ""
    """Warning about the default weight, shown when no weight is given."""
    __call__: Callable[..., Tensor]  # nn.Module declares Any
    needs_targets: ClassVar[bool] = False
    undefined: ClassVar[str] = ""
    """Message for examples at which the loss has no value."""

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: Weight | None = None,
        examples: int | None = 32,
        every_n_steps: int = 3,
        gradient_accumulation_steps: int = 1,
        seed: int = 0,
        centered: bool = True,
        per_layer: bool = False,
        sync: bool = False,
        statistics: Statistics = "training",
        on_nonfinite: Literal["raise", "skip"] = "raise",
        clip: float | None = 0.25,
        params: str | Sequence[str] | None = None,
        forward_fn: ForwardFn | None = None,
    ) -> None:
        super().__init__()
        if weight is None:
            weight = self.default_weight
            if self.caution:
                warnings.warn(
                    f"{type(self).__name__}: no weight is given, and the default one, {weight:g}, {self.caution} Pass "
                    "weight= to say which you want.",
                    UserWarning,
                    stacklevel=3,
                )
        self.weight: Weight = weight if callable(weight) else _check_weight(weight)
        self.examples = None if examples is None else checks.count("examples", examples, 2)
        self.every_n_steps = checks.count("every_n_steps", every_n_steps)
        self.gradient_accumulation_steps = checks.count("gradient_accumulation_steps", gradient_accumulation_steps)
        self.seed = checks.seed(seed)
        self.centered = checks.flag("centered", centered)
        self.per_layer = checks.flag("per_layer", per_layer)
        self.sync = checks.flag("sync", sync)
        self.clip = None if clip is None else checks.positive("clip", clip)
        self.on_nonfinite = checks.choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        self._features = TangentFeatures(model, params=params, forward_fn=forward_fn, statistics=statistics)
        self._features.over_ranks = sync
        self._refer(model)
        self._num_outputs: int | None = None
        self._held: bool | None = None
        self._reuse = Reuse()
        self._calls = Count()
        self._warned: set[str] = set()
        self.register_buffer("step", torch.zeros((), dtype=torch.long, device="cpu"))

    def bind(self, model: nn.Module) -> None:
        """Refer to ``model`` from now on, after unpickling (which drops the model) or after wrapping it in DDP.

        Raises:
            ValueError: if its selected parameters differ in name or shape.
        """
        self._features.bind(model)
        self._refer(model)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TangentLoss:
        step = self.step
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Keep the count where weights have no values: on the meta device, and after to_empty().
        self.step = step if self.step.is_meta else self.step.copy_(step)
        return self

    def _refer(self, model: nn.Module) -> None:
        self._ddp = Reference(find_ddp(model))
        ranks = ranks_of(self._features.model)
        if self.sync and ranks not in (None, world_size()):
            raise ValueError(f"sync: the model is sharded over {ranks} of {world_size()} ranks. Leave sync out.")

    @eager
    def forward(self, x: Any, y: Tensor | None = None, *, outputs: Tensor | None = None) -> Tensor:
        """Return the weighted loss of a batch.

        Args:
            x: the model's inputs: tensor, tuple or dict of tensors with the examples on axis 0.
            y: their targets, in any form that :func:`alignreg.targets.encode` accepts.
            outputs: f(x) ``(n, c)`` of your own forward pass, with its graph, to save another pass. They are used only
                if all examples count and your pass equals that of this loss (no dropout, no autocast), which is checked
                on a few examples; otherwise the loss runs the model itself.

        Returns:
            A scalar in the precision of the parameters, float32 at least.

        Raises:
            TypeError: if ``x`` or the model's output is not made of tensors.
            ValueError: if ``x`` is empty, does not fit ``y`` or ``outputs``, or carries a gradient history; if the
                output is not a finite ``(n, c)``; or if a schedule returns anything but a finite number ≥ 0.
            RuntimeError: inside a transform of ``torch.func`` or inside ``torch.utils.checkpoint``.
        """
        if torch._C._functorch.peek_interpreter_stack() is not None:  # noqa: SLF001 - no public name
            raise RuntimeError(
                "a loss on tangent features computes its gradient by itself and cannot run inside a transform of "
                "torch.func (grad, vmap, ...). Use backward() or torch.autograd.grad."
            )
        if is_checkpointed():
            raise RuntimeError(
                "a loss on tangent features cannot run inside torch.utils.checkpoint, whose backward pass would run it "
                "again, as another step. Call it outside and add it to the result of the checkpointed function."
            )
        batch = as_inputs(x)
        check_targets(y, size(batch), required=self.needs_targets)
        check_outputs(outputs, size(batch))
        zero = self._zero()
        if not self.training:
            return zero
        call = self._calls.read(self.step)
        step = call // self.gradient_accumulation_steps
        weight = _check_weight(self.weight(step), step) if callable(self.weight) else self.weight
        self._count()  # also if this call raises: ranks with different steps would diverge or wait for each other
        loss = None
        with deferred.deferred() as doubts:
            if y is not None and self.needs_targets:
                encode(y, self._width(batch), size(batch))  # checks all targets, at every step
            if weight > 0 and step % self.every_n_steps == 0:
                loss = self._evaluate(self._sample(batch, y, outputs, call), weight * self.every_n_steps, doubts)
        if loss is None:
            return zero
        if not loss.requires_grad:
            loss = loss + zero  # the features depend on no parameter, as those of a linear model
        if self._ddp.module is not None:
            require_sync(loss, self._ddp.module)
        elif world_size() > 1 and not is_sharded(self._features.model):
            self._warn(
                f"the model is not wrapped in DistributedDataParallel, though {world_size()} processes are running, so "
                "this loss cannot check that its gradients are averaged. Pass the wrapped model, or bind() it."
            )
        return loss

    @contextmanager
    def same_step(self) -> Iterator[None]:
        """Make all calls inside the block use the same probes and examples, and count them once.

        This is for optimizers that evaluate a step more than once, such as L-BFGS and SAM::

            with reg.same_step():
                optimizer.step(closure)
        """
        if self._held is not None:
            yield  # an enclosing block counts
            return
        self._held = False
        try:
            yield
        finally:
            called, self._held = self._held, None
            if called:
                self._calls.add_one(self.step)

    def _count(self) -> None:
        if self._held is None:
            self._calls.add_one(self.step)
        else:
            self._held = True

    @override
    def extra_repr(self) -> str:
        names = ("weight", "examples", "every_n_steps", "gradient_accumulation_steps", "seed", "centered")
        return ", ".join(f"{name}={getattr(self, name)}" for name in (*names, "per_layer", "sync"))

    @abstractmethod
    def _estimate(self, sample: Sample, *, create_graph: bool) -> Tensor:
        """Return the loss of the sample with weight 1, or raise UndefinedLossError where it has no value."""

    def _evaluate(self, sample: Sample, factor: float, doubts: Deferred) -> Tensor | None:
        try:
            try:
                return self._differentiated(sample, factor, doubts)
            except SelfCheckError:
                return self._differentiated(sample, factor, doubts)  # by another route, since this one failed
        except UndefinedLossError as error:
            self._warn(str(error))
        except (NonFiniteOutputError, NonFiniteGradientError) as error:
            if self.on_nonfinite == "raise":
                raise
            self._warn(f"A step of {type(self).__name__} is left out: {error}")
        return None

    def _differentiated(self, sample: Sample, factor: float, doubts: Deferred) -> Tensor | None:
        create_graph = torch.is_grad_enabled()
        # The graph of the caller's outputs leads to the parameters themselves, not to aliases.
        with self._features.held(detached=sample.outputs is None) as own:
            value = self._estimate(sample, create_graph=create_graph)
            if not create_graph or not value.requires_grad:
                doubts.settle()
                return factor * value.detach()
            leaves = graph.leaves_of(graph.nodes(value))
            gradients = graph.gradients(
                factor * value, leaves, retain_graph=sample.outputs is not None, allow_unused=True
            )
            value = factor * value.detach()
            known = [(own.get(id(leaf), leaf), g) for leaf, g in zip(leaves, gradients, strict=True) if g is not None]
            parameters, slopes = [p for p, _ in known], [g for _, g in known]
            share = self._share(value, parameters, slopes, doubts)
        return with_gradients(value, parameters, [g if share == 1 else share * g for g in slopes])

    def _share(
        self, value: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor], doubts: Deferred
    ) -> float:
        """Return the factor by which clipping scales the gradients; 1 if they are not clipped."""
        if self.clip is None:
            require_finite([value, *gradients])
            doubts.settle()
            return 1.0
        share = clipped_share(value, parameters, gradients, self.clip, self._together, doubts)
        if share < 1:
            self._warn(
                f"the gradient of this loss was {self.clip / share:.3g} times as long as the weights, and "
                f"is cut to {self.clip:.3g} times: a step along it would have changed the weights beyond recovery. "
                "Begin with a smaller weight, as in weight=lambda step: 0.01 * min(1, step / 100).",
                about="clip",
            )
        return share

    def _together(self, share: Tensor) -> bool:
        """Replace ``share`` by the minimum over the ranks that sum one gradient; return whether there are several."""
        if not self.sync or world_size() == 1:
            return False
        dist.all_reduce(share, dist.ReduceOp.MIN, group=self._group)
        return True

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return None if self._ddp.module is None else self._ddp.module.process_group

    def _width(self, x: Batch) -> int:
        """Return c, found by running the model once: on two examples, or on the batch if that fails."""
        if self._num_outputs is None:
            with suppress(Exception):
                self._num_outputs = self._features.outputs(slice_examples(x, 0, 2)).shape[1]
        if self._num_outputs is None:
            try:
                self._num_outputs = self._features.outputs(x).shape[1]
            except NonFiniteOutputError as error:  # the evaluation raises it, on all ranks together
                self._num_outputs = error.num_outputs
        return self._num_outputs

    def _mean_over_layers(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the mean of the values of layers that are defined (not NaN); raise UndefinedLossError if none is."""
        stacked = torch.stack(list(values.values()))
        defined = ~stacked.detach().isnan()

        def then(flags: list[float]) -> None:
            if not any(flags):
                raise UndefinedLossError(self.undefined)
            if not all(flags):
                odd = [layer for layer, flag in zip(values, flags, strict=True) if not flag]
                self._warn(
                    f"layers {odd} leave this loss undefined, because their tangent features vanish or have nothing "
                    "along the targets. The mean is taken over the other layers."
                )

        deferred.look(defined, then)
        return stacked.masked_fill(~defined, 0.0).sum() / defined.sum()

    def _sample(self, x: Batch, y: Tensor | None, outputs: Tensor | None, call: int) -> Sample:
        n = size(x)
        if self.examples is not None and self.examples < n:
            rows = sketches.subset(n, self.examples, seed=self.seed, step=call, stream=rank())
            return Sample(take(x, rows), None if y is None else y[on(rows, y.device)], None, n, call)
        return Sample(x, y, self._reusable(x, outputs), n, call)

    def _reusable(self, x: Batch, outputs: Tensor | None) -> Tensor | None:
        """Return ``outputs`` if their graph can replace that of a pass of our own."""
        if outputs is None or not torch.is_grad_enabled():
            return None
        static = self._ddp.module is not None and self._ddp.module.static_graph
        if not static and not is_sharded(self._features.model) and self._reuse.agree(self._features, x, outputs):
            return outputs
        self._warn(
            "outputs: they have no graph that serves here (of these parameters, twice differentiable, without hooks on "
            "gradients), or differ from the model's outputs without dropout, in full precision and with the statistics "
            "of this loss. The loss runs the model itself. Leave outputs out."
        )
        return None

    def _zero(self) -> Tensor:
        like = self._features.like
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.zeros((), dtype=dtype, device=like.device, requires_grad=torch.is_grad_enabled())

    def _warn(self, message: str, about: str = "") -> None:
        """Warn once for each message, or once for each subject ``about`` if there is one."""
        if (about or message) not in self._warned:
            self._warned.add(about or message)
            warnings.warn(message, UserWarning, stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ddp": Reference(None)}


def _check_weight(weight: Any, step: int | None = None) -> float:
    source = "or a function of the step" if step is None else f"from the schedule at step {step}"
    return checks.number("weight", weight, f"a finite number of at least 0, {source}", lambda value: value >= 0)
