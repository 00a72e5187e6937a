"""Base class of the losses that see the tangent kernel through products with random probes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from alignreg import checks, estimators, sketches
from alignreg.checks import deferred
from alignreg.distributed.wrappers import counts_of_ranks, rank, sum_over_ranks
from alignreg.losses import micro_batches
from alignreg.losses.base import TangentLoss, Weight
from alignreg.losses.sample import Sample, UndefinedLossError
from alignreg.tangents.batch import Batch, flat, on, size, slice_examples
from alignreg.tangents.finite import NonFiniteGradientError, NonFiniteOutputError, require_finite
from alignreg.tangents.linearization import ForwardFn
from alignreg.tangents.normalization import Statistics
from alignreg.targets import encode


class Probed(NamedTuple):
    """Products of a kernel with the probes."""

    gram: Tensor
    """ω_aᵀKω_b ``(m, m)``; the probes are centered if the loss is. In losses that need targets, u comes before them."""
    exact: int
    """How many leading columns are no probes: 1 for u, 0 without targets."""
    n: int
    """Number of examples."""
    c: int
    """Number of outputs."""
    drawn_from: int
    """Size of the batch that the n examples were drawn from."""

    @property
    def projection(self) -> Tensor:
        """uᵀKu = yᵀKy/‖y‖², in losses that need targets."""
        assert self.exact
        return self.gram[0, 0]


class ProbeLoss(TangentLoss, ABC):
    """A loss from m Gaussian probes ω: one forward pass and m backward passes, themselves differentiated.

    With targets, one more backward pass is along u = y/‖y‖, the direction of all centered targets. The probes are then
    orthogonal to u, so that estimates are exact along u and random only in the rest (:mod:`alignreg.estimators`).

    The products Φᵀω are computed by parameter, so the values of all layers come at no extra cost. With ``sync`` they
    are summed over ranks: one reduction of m·P numbers (P more with targets) follows some of a few numbers. Probes and
    targets are centered by the mean of all examples, and u is the direction of all targets. Every rank then has the
    loss of all examples, and the mean of the ranks' gradients, computed by DDP, is its gradient. Ranks may have batches
    of different sizes, and must call the loss equally often.

    Args:
        model: the model, as in :class:`.TangentLoss`, like all options that are not listed here.
        probes: the number m; the loss has its own default.
        micro_batch_size: how many examples go through the model at once. Memory is needed only for these, and the loss
            needs a third more time. The default is all examples, or an eighth of them if the model checkpoints its
            activations to save memory.
    """

    default_probes: ClassVar[int]
    least_probes: ClassVar[int]

    def __init__(
        self,
        model: nn.Module,
        *,
        probes: int | None = None,
        micro_batch_size: int | None = None,
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
        super().__init__(
            model,
            weight=weight,
            examples=examples,
            every_n_steps=every_n_steps,
            gradient_accumulation_steps=gradient_accumulation_steps,
            seed=seed,
            centered=centered,
            per_layer=per_layer,
            sync=sync,
            statistics=statistics,
            on_nonfinite=on_nonfinite,
            clip=clip,
            params=params,
            forward_fn=forward_fn,
        )
        self.probes = checks.count("probes", self.default_probes if probes is None else probes, self.least_probes)
        self.micro_batch_size = None if micro_batch_size is None else checks.count("micro_batch_size", micro_batch_size)
        self._independent = False

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, probes={self.probes}"

    @abstractmethod
    def _of_kernel(self, seen: Probed) -> Tensor:
        """Return the loss of a kernel with weight 1; NaN without a gradient where it is undefined."""

    def _estimate(self, sample: Sample, *, create_graph: bool) -> Tensor:
        mine, c = size(sample.x), self._width(sample.x)
        like = self._features.like
        target = None
        if self.needs_targets:
            assert sample.y is not None
            target = on(encode(sample.y, c, mine), like.device)
        sizes, drawn_from, before = [mine], sample.drawn_from, rank() << 32
        if self.sync:
            sizes, drawn = counts_of_ranks((mine, drawn_from), like.device, self._group)
            drawn_from, before = sum(drawn), sum(sizes[: rank(self._group)])
        n = sum(sizes)
        # Each rank has its own rows of one global draw: equal probes on two ranks would be correlated.
        omega = sketches.probes(self.probes, mine, c, seed=self.seed, step=sample.draw, offset=before, like=like)
        if self.centered:
            omega = omega - self._sum(omega.sum(1, keepdim=True)) / n
        cotangents = omega
        if target is not None:
            u = self._direction(target, n).to(omega)
            # In the numbers of all ranks together: u is a direction of the whole batch. It is centered, as omega is.
            overlap = self._sum(torch.einsum("mnc,nc->m", omega, u))
            cotangents = torch.cat([u[None], omega - overlap[:, None, None] * u])
        grams = self._grams(sample, cotangents, create_graph=create_graph, ranks=len(sizes))
        layers = self._features.layers if self.per_layer else {"": list(grams)}
        values = {}
        for layer, names in layers.items():
            gram = torch.stack([grams[name] for name in names]).sum(0)
            values[layer] = self._of_kernel(Probed(gram, int(self.needs_targets), n, c, drawn_from))
        return self._mean_over_layers(values)

    def _direction(self, target: Tensor, n: int) -> Tensor:
        """Return the centered targets of this rank over the norm of all; raise UndefinedLossError for constant ones."""
        y = target - self._sum(target.sum(0)) / n
        square, scale = self._sum(torch.stack([y.square().sum(), target.square().sum()]))
        deferred.require(
            square > 1e-28 * scale,  # below, it is the rounding error of a constant
            lambda: UndefinedLossError(
                "All examples of a batch have the same target, so alignment is undefined and the loss is zero there."
            ),
        )
        direction: Tensor = y / square.sqrt()
        return direction

    def _norm2(self, seen: Probed) -> Tensor:
        """Return the estimate of ‖K‖_F², raised to (tr K)² / rows, the least value of a kernel with that many rows."""
        rows = (seen.n - 1) * seen.c if self.centered else seen.n * seen.c
        least = estimators.trace(seen.gram, seen.exact).square() / rows
        return torch.maximum(estimators.gaussian_frobenius2(seen.gram, seen.exact), least)

    def _sum(self, value: Tensor) -> Tensor:
        return sum_over_ranks(value, self._group) if self.sync else value

    def _grams(self, sample: Sample, cotangents: Tensor, *, create_graph: bool, ranks: int) -> dict[str, Tensor]:
        if ranks == 1 and create_graph and sample.outputs is None:
            step = self._examples_at_once(sample.x)
            if step < size(sample.x):
                return micro_batches.grams(self._features, sample.x, cotangents, step)
        if ranks == 1:
            return self._features.grams(sample.x, cotangents, outputs=sample.outputs, create_graph=create_graph)
        # Sum the columns, then multiply: products of sums over ranks are not sums of products.
        try:
            columns = self._features.pullback(sample.x, cotangents, outputs=sample.outputs, create_graph=create_graph)
        except (NonFiniteOutputError, NonFiniteGradientError):
            # The other ranks wait for this rank's part; NaN tells them.
            own = self._features.parameters.items()
            columns = {name: cotangents.new_full((len(cotangents), *p.shape), torch.nan) for name, p in own}
        joined = self._sum(torch.cat([flat(value) for value in columns.values()], dim=1))
        parts = torch.split(joined, [value[0].numel() for value in columns.values()], dim=1)
        require_finite([joined])
        return {name: estimators.inner_products(part) for name, part in zip(columns, parts, strict=True)}

    def _examples_at_once(self, x: Batch) -> int:
        n, coupled = size(x), self._features.couples_examples
        if self.micro_batch_size is None and (coupled or not _checkpoints(self._features.model)):
            return n
        if coupled:
            raise ValueError(
                "micro_batch_size: expected None for a model that normalizes by batch statistics in training mode, "
                f"got {self.micro_batch_size}. Leave it out, since the examples must go through the model together."
            )
        step = max(1, n // 8) if self.micro_batch_size is None else self.micro_batch_size
        if step < n and not self._independent:
            self._features.require_independent_examples(slice_examples(x, 0, 2))
            self._independent = True
        return step


def _checkpoints(model: nn.Module) -> bool:
    """Return whether activation checkpointing is on, as marked by transformers and timm (for training mode only)."""
    names = ("gradient_checkpointing", "grad_checkpointing")
    return any(getattr(module, name, False) is True for module in model.modules() for name in names)
