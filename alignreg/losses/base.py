"""What every loss on tangent features shares: when it applies, to which examples, with which probes."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn

from alignreg import sketches
from alignreg.batch import Batch, as_inputs, size, take
from alignreg.distributed import find_ddp, rank, require_sync, world_size
from alignreg.evaluation import ForwardFn
from alignreg.tangents import TangentFeatures


class Sample(NamedTuple):
    """The examples of one evaluation of a loss, and its probes."""

    x: Batch
    y: Tensor | None
    """Targets as they came; ``None`` for a loss that takes none."""
    probes: Tensor
    """Ω ``(m, s, c)`` for the s examples, centred over them where the loss is."""
    drawn_from: int
    """n, how many examples the batch had."""


class TangentLoss(nn.Module, ABC):
    r"""A term to add to a training loss, on the tangent features of the live model.

    ``reg(x, y)`` is a differentiable scalar; it needs no prediction of the model and runs the bare module on its own,
    in full precision, with dropout off and normalisation with its running statistics. The loss holds the model by
    reference and registers nothing of it: ``parameters()`` is empty, ``state_dict()`` holds the step alone.

    It **counts its calls in training mode**, one an optimiser step. Probes and examples are drawn afresh from
    (seed, step, rank) at each step where it applies; nothing is drawn from torch's global random state. Where it does
    not apply (``eval()``, weight zero, a step between strides) the result is an exact zero that can be differentiated.

    Under DDP each rank evaluates its own examples and DDP averages the gradients, provided that this loss and the
    task's loss are differentiated in **one** ``backward()``. Pass the wrapped model, before its first forward pass: the
    other ways then raise in ``backward()`` instead of letting the replicas drift apart. A forward hook on the wrapper
    watches over that; outputs that are no tensors, nor made of them, it cannot see.

    Args:
        model: the model, possibly wrapped (DDP, ``torch.compile``, Accelerate).
        weight: factor of the loss, ≥ 0.
        examples: how many examples of a batch to use, drawn uniformly; all by default.
        every_n_steps: apply at every n-th step, with n times the weight, which keeps the mean over steps.
        probes: m, the number of random probes; as many as the loss does well with by default.
        seed: of probes and examples.
        centered: centre the kernel over the examples.
        params: glob pattern or patterns of parameter names whose tangent features count; all trainable ones by
            default. Gradients flow to whatever these features depend on.
        forward_fn: ``(model, x) -> (n, c)`` for models with another output.
    """

    step: Tensor
    default_probes: ClassVar[int]
    least_probes: ClassVar[int]

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float,
        examples: int | None = None,
        every_n_steps: int = 1,
        probes: int | None = None,
        seed: int = 0,
        centered: bool = True,
        params: str | Sequence[str] | None = None,
        forward_fn: ForwardFn | None = None,
    ) -> None:
        super().__init__()
        probes = self.default_probes if probes is None else probes
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight: expected a finite number of at least 0, got {weight!r}.")
        _check_count("examples", examples, 2, optional=True)
        _check_count("every_n_steps", every_n_steps, 1)
        _check_count("probes", probes, self.least_probes)
        self.weight = weight
        self.examples = examples
        self.every_n_steps = every_n_steps
        self.probes = probes
        self.seed = seed
        self.centered = centered
        self._features = TangentFeatures(model, params=params, forward_fn=forward_fn)
        self._ddp = _Reference(find_ddp(model))
        self._num_outputs: int | None = None
        self._warned: set[str] = set()
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def bind(self, model: nn.Module) -> None:
        """Refer to ``model`` from now on: after unpickling, which drops it, or after wrapping it in DDP.

        Raises:
            ValueError: if its selected parameters differ in name or shape.
        """
        self._features.bind(model)
        self._ddp = _Reference(find_ddp(model))

    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        """Return the weighted loss of a batch.

        Args:
            x: the model's inputs: tensor, tuple or dict of tensors with the examples on axis 0.
            y: their targets, as :func:`alignreg.targets.encode` reads them.

        Returns:
            A scalar in the precision of the parameters, float32 at least.

        Raises:
            TypeError: if ``x`` or the model's output is not made of tensors.
            ValueError: if ``x`` is empty, does not fit ``y`` or carries a gradient history, or the output is not a
                finite ``(n, c)``.
        """
        batch = as_inputs(x)
        if not self.training:
            return self._zero()
        step = int(self.step)
        value = None
        if self.weight > 0 and step % self.every_n_steps == 0:
            sample = self._sample(batch, y, step)
            with torch.autocast(sample.probes.device.type, enabled=False):
                value = self._estimate(sample, create_graph=torch.is_grad_enabled())
        self.step += 1
        if value is None:
            return self._zero()
        loss = self.weight * self.every_n_steps * value
        if not loss.requires_grad:
            loss = loss + self._zero()  # features that depend on no parameter, as those of a linear model
        if self._ddp.module is not None:
            require_sync(loss, self._ddp.module)
        elif world_size() > 1:
            self._warn(
                f"the model is not wrapped in DistributedDataParallel, though {world_size()} processes are up: whether "
                "this loss's gradients are averaged over them cannot be checked. Pass the wrapped model, or bind() it."
            )
        return loss

    def extra_repr(self) -> str:
        """Show the options."""
        names = ("weight", "examples", "every_n_steps", "probes", "seed", "centered")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    @abstractmethod
    def _estimate(self, sample: Sample, *, create_graph: bool) -> Tensor | None:
        """Return the loss of the sample with weight 1, or ``None`` where it is undefined."""

    def _sample(self, x: Batch, y: Tensor | None, step: int) -> Sample:
        n = size(x)
        if y is not None and not isinstance(y, Tensor):
            raise TypeError(f"target: expected a tensor, got {type(y).__name__}. Convert it with torch.as_tensor.")
        if y is not None and (y.ndim == 0 or len(y) != n):
            raise ValueError(f"target: expected one row for each of the {n} inputs, got shape {tuple(y.shape)}.")
        if self._num_outputs is None:
            self._num_outputs = self._features.outputs(x).shape[1]
        if self.examples is not None and self.examples < n:
            rows = sketches.subset(n, self.examples, seed=self.seed, step=step, stream=rank())
            x, y = take(x, rows), None if y is None else y[rows.to(y.device)]
        like = next(iter(self._features.parameters.values())).detach()
        probes = sketches.probes(
            self.probes,
            size(x),
            self._num_outputs,
            seed=self.seed,
            step=step,
            offset=rank() << 32,  # each rank's own rows of one global draw, however uneven the batches
            like=like,
        )
        return Sample(x, y, probes - probes.mean(1, keepdim=True) if self.centered else probes, n)

    def _zero(self) -> Tensor:
        like = next(iter(self._features.parameters.values()))
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.zeros((), dtype=dtype, device=like.device, requires_grad=torch.is_grad_enabled())

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ddp": _Reference(None)}


@final
class _Reference:
    """Keeps a module out of the registry of submodules, and a copy of the holder on the same module."""

    def __init__(self, module: nn.parallel.DistributedDataParallel | None) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reference:
        return _Reference(memo.get(id(self.module), self.module))


def _check_count(name: str, value: int | None, least: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}.")
