"""What metrics of the exact kernel share: the examples that they are shown, which they keep."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from alignreg.distributed.wrappers import rank
from alignreg.metrics.base import TangentMetric
from alignreg.metrics.records import Record, digest, pack, unpack
from alignreg.tangents.batch import Batch, as_inputs, concatenate, map_tensors, shapes, size, take
from alignreg.tangents.switches import eager
from alignreg.targets import encode


class Examples(NamedTuple):
    """What was kept on all ranks."""

    inputs: Batch
    targets: Tensor
    """Values ``(n, c)``, NaN where they are not known."""
    groups: Tensor
    """Indices ``(n,)``, zero where there are no groups."""
    batch_size: int
    """Of the largest batch that came."""


class ProbeSetMetric(TangentMetric, ABC):
    """A metric that keeps examples and looks at all of them at once, with the weights of one moment."""

    num_outputs: int
    max_examples: int | None = None
    _exact: tuple[str, ...] = ("binding", "records")
    _weights: str | None = None

    def reset(self) -> None:
        """Forget all examples."""
        super().reset()
        if not self._in_forward:  # where torchmetrics resets for the batch's own value, to add it to the others after
            self._weights = None

    @eager
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Keep a batch and return the value of that batch alone."""
        value = super().forward(*args, **kwargs)
        if self.max_examples is not None:
            rows: list[Tensor] = self._get("records")
            room = self.max_examples
            for index, row in enumerate(rows):
                if room <= 0:  # torchmetrics has joined what was kept before with this batch
                    del rows[index:]
                    break
                room -= sum(size(record.inputs) for record in unpack(row))
        return value

    def _hold_examples(self) -> None:
        """Add the state; to be called by the constructor."""
        self.add_state(self._name("records"), [], dist_reduce_fx="cat")

    def _add(self, inputs: Any, target: Tensor | None) -> None:
        """Check a batch and keep it."""
        with self._unchanged_on_error():
            batch = as_inputs(inputs)
            self._keep(batch, target, torch.zeros(size(batch), dtype=torch.long, device="cpu"))

    def _keep(self, batch: Batch, target: Tensor | None, groups: Tensor) -> None:
        """Add examples to the state."""
        unknown = torch.full((size(batch), self.num_outputs), torch.nan, dtype=torch.float64, device="cpu")
        y = unknown if target is None else encode(target, self.num_outputs, size(batch))
        rows: list[Tensor] = self._get("records")
        known = [record for row in rows for record in unpack(row)]
        weights = self._same_weights(self._weights)
        if known and shapes(known[0].inputs) != shapes(batch):
            raise ValueError(
                f"inputs: all kept batches need the same shape per example, structure and dtype, got {shapes(batch)} "
                f"after {shapes(known[0].inputs)}. Pad them alike."
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
        """Return the examples of all ranks, inputs on the model's device.

        If there are too many, ranks take turns, as a distributed sampler hands examples out.
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
            shown: dict[int, int] = {}
            for record in records:
                for _ in range(size(record.inputs)):
                    turns.append((shown.get(record.rank, 0), record.rank))
                    shown[record.rank] = shown.get(record.rank, 0) + 1
            order = sorted(range(len(turns)), key=turns.__getitem__)[: self.max_examples]
            x, y, groups = take(x, torch.tensor(order, device="cpu")), y[order], groups[order]
        device = next(iter(self._features.parameters.values())).device
        largest = max(size(record.inputs) for record in records)
        return Examples(map_tensors(lambda t: t.to(device), x), y, groups, largest)

    def _check_width(self, values: Tensor) -> None:
        if values.shape[1] != self.num_outputs:
            raise ValueError(
                f"num_outputs: expected {self.num_outputs} outputs per example, the model gives {values.shape[1]}."
            )

    def _same_weights(self, *known: str | None) -> str:
        weights = digest(self._features.parameters)
        if any(other not in (None, weights) for other in known):
            raise RuntimeError(
                f"the model's weights changed since the first update of {type(self).__name__}: all examples must see "
                "the same weights. Call reset() first, and compute() before the next optimizer step."
            )
        return weights

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        # torchmetrics lets a rank without examples send floats where the others send bytes.
        name = self._name("records")
        if len(getattr(self, name, "not held")) == 0:
            setattr(self, name, [torch.empty(0, dtype=torch.uint8, device=self.device)])
        super()._sync_dist(dist_sync_fn, process_group=process_group)
