"""The base class of metrics that keep the examples they receive."""

from __future__ import annotations

from abc import ABC
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from alignreg.distributed.wrappers import rank
from alignreg.metrics.base import TangentMetric
from alignreg.metrics.records import Record, digest, pack, unpack
from alignreg.tangents.batch import Batch, as_inputs, concatenate, map_tensors, shapes, size, take
from alignreg.tangents.switches import eager
from alignreg.targets import encode


class Examples(NamedTuple):
    """The examples kept on all ranks."""

    inputs: Batch
    targets: Tensor
    """Values ``(n, c)``, NaN where they are unknown."""
    groups: Tensor
    """Indices ``(n,)``, zero without groups."""
    batch_size: int
    """The size of the largest batch received."""


class ProbeSetMetric(TangentMetric, ABC):
    """A metric that keeps examples and evaluates all of them at once, at the same weights.

    A subclass sets ``num_outputs``, and ``max_examples`` if it keeps only the first ones. The options are those of
    :class:`TangentMetric`.
    """

    num_outputs: int
    max_examples: int | None = None
    _exact: tuple[str, ...] = ("binding", "records")
    _weights: str | None = None

    @eager
    def update(self, inputs: Any, target: Tensor | None = None) -> None:
        """Keep a batch of examples, up to ``max_examples`` in total.

        Args:
            inputs: tensor, or tuple or dict of tensors, with the n examples on axis 0: the *model's inputs*, not its
                predictions. In a ``MetricCollection`` use keywords, ``update(inputs=x, preds=p, target=y)``.
            target: class indices ``(n,)`` or values ``(n, c)``; with one output, values ``(n,)``. Optional for
                :class:`TangentSpectrum`.

        Raises:
            TypeError: if ``inputs`` or the model's output is not made of tensors.
            ValueError: if ``inputs`` carries a gradient history, is empty, or does not fit ``target``; if a class
                is outside [0, num_outputs); if the model's output is not a finite ``(n, num_outputs)``.
            RuntimeError: if the weights changed since the first update.
        """
        with self._unchanged_on_error():
            batch = as_inputs(inputs)
            self._keep(batch, target, torch.zeros(size(batch), dtype=torch.long, device="cpu"))

    @override
    def reset(self) -> None:
        super().reset()
        if not self._in_forward:  # forward() resets to compute the value of the batch, and restores the states later
            self._weights = None

    @override
    @eager
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = super().forward(*args, **kwargs)
        if self.max_examples is not None:
            rows: list[Tensor] = self._get("records")
            room = self.max_examples
            for index, row in enumerate(rows):
                if room <= 0:  # torchmetrics has appended the batch to the examples kept before
                    del rows[index:]
                    break
                room -= sum(size(record.inputs) for record in unpack(row))
        return value

    def _hold_examples(self) -> None:
        """Add the state. The constructor calls this."""
        self.add_state(self._name("records"), [], dist_reduce_fx="cat")

    def _keep(self, batch: Batch, target: Tensor | None, groups: Tensor) -> None:
        """Check a batch and add it to the state."""
        unknown = torch.full((size(batch), self.num_outputs), torch.nan, dtype=torch.float64, device="cpu")
        y = unknown if target is None else encode(target, self.num_outputs, size(batch))
        rows: list[Tensor] = self._get("records")
        known = [record for row in rows for record in unpack(row)]
        weights = self._same_weights(self._weights)
        if known and shapes(known[0].inputs) != shapes(batch):
            raise ValueError(
                f"inputs: expected the same shape per example, structure and dtype in all batches, got {shapes(batch)} "
                f"after {shapes(known[0].inputs)}. Pad all batches to one shape."
            )
        self._check_width(self._features.outputs(batch))
        room = size(batch)
        if self.max_examples is not None:
            room = min(room, self.max_examples - sum(size(record.inputs) for record in known))
        if room > 0:
            some = map_tensors(lambda t: t[:room], batch)
            rows.append(pack(Record(some, y[:room], groups[:room], weights, rank())).to(self.device))
        self._weights = weights

    def _examples(self) -> Examples:
        """Return the examples of all ranks, with the inputs on the model's device.

        If there are too many, they are taken from the ranks in turn, in the order of a distributed sampler.
        """
        rows = self._get("records")
        records = unpack(dim_zero_cat(rows)) if len(rows) else []
        if not records:
            raise ValueError(f"{type(self).__name__}: no examples have been added. Call update() first.")
        self._same_weights(*(record.weights for record in records))
        y = torch.cat([record.targets for record in records])
        groups = torch.cat([record.groups for record in records])
        x = concatenate([record.inputs for record in records])
        if self.max_examples is not None and len(y) > self.max_examples:
            turns: list[tuple[int, int]] = []
            shown: Counter[int] = Counter()
            for record in records:
                turns += [(shown[record.rank] + index, record.rank) for index in range(size(record.inputs))]
                shown[record.rank] += size(record.inputs)
            order = sorted(range(len(turns)), key=turns.__getitem__)[: self.max_examples]
            x, y, groups = take(x, torch.tensor(order, device="cpu")), y[order], groups[order]
        device = next(iter(self._features.parameters.values())).device
        largest = max(size(record.inputs) for record in records)
        return Examples(map_tensors(lambda t: t.to(device), x), y, groups, largest)

    def _check_width(self, values: Tensor) -> None:
        if values.shape[1] != self.num_outputs:
            raise ValueError(
                f"num_outputs: expected {self.num_outputs} outputs per example, the model gives {values.shape[1]}. "
                f"Pass num_outputs={values.shape[1]}, or a forward_fn."
            )

    def _same_weights(self, *known: str | None) -> str:
        weights = digest(self._features.parameters)
        if any(other not in (None, weights) for other in known):
            raise RuntimeError(
                f"the model's weights changed since the first update of {type(self).__name__}, which evaluates all "
                "examples at the same weights. Call compute() before the optimizer step and reset() after it."
            )
        return weights

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        # Without this, a rank without examples would send floats where the others send bytes.
        name = self._name("records")
        if len(getattr(self, name, "not held")) == 0:
            setattr(self, name, [torch.empty(0, dtype=torch.uint8, device=self.device)])
        super()._sync_dist(dist_sync_fn, process_group=process_group)
