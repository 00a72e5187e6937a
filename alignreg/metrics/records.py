"""Probe examples as bytes: what torchmetrics can gather from ranks without knowing their structure."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from alignreg.distributed.sharding import is_shard
from alignreg.tangents.batch import Batch, map_tensors, tensors

_LENGTH = 8
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Record(NamedTuple):
    """A batch of examples, the weights that the model had when it came, and the rank that saw it."""

    inputs: Batch
    targets: Tensor
    groups: Tensor
    weights: str
    rank: int


def pack(record: Record) -> Tensor:
    """Return the record as one row of bytes, its length first, so that rows can be joined."""
    buffer = io.BytesIO()
    inputs = map_tensors(lambda t: t.detach().cpu(), record.inputs)
    record = record._replace(inputs=inputs, targets=record.targets.cpu(), groups=record.groups.cpu())
    torch.save(record._asdict(), buffer)
    payload = buffer.getvalue()
    return torch.frombuffer(bytearray(len(payload).to_bytes(_LENGTH, "little") + payload), dtype=torch.uint8)


def unpack(rows: Tensor) -> list[Record]:
    """Return the records in joined rows. No code in them is run."""
    data = rows.cpu().numpy().tobytes()
    records = []
    while data:
        end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
        records.append(Record(**torch.load(io.BytesIO(data[_LENGTH:end]), weights_only=True)))
        data = data[end:]
    return records


def canonical_order(x: Batch, y: Tensor) -> list[int]:
    """Return the indices of the examples in an order that is theirs, in whatever order they come."""

    def key(index: int) -> bytes:
        total = hashlib.blake2b(digest_size=16)
        for part in (*tensors(x), y):
            total.update(_bytes(part[index]))
        return total.digest()

    return sorted(range(len(y)), key=key)


def _bytes(values: Tensor) -> memoryview:
    return values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def digest(parameters: Mapping[str, Tensor]) -> str:
    """Return a hash of the values of the parameters; of those sharded, of this rank's part."""
    total = hashlib.blake2b(digest_size=16)
    for name, parameter in parameters.items():
        total.update(name.encode())
        total.update(_bytes(parameter.to_local() if is_shard(parameter) else parameter))  # type: ignore[attr-defined]
    return total.hexdigest()


def fingerprint(parameters: Mapping[str, Tensor]) -> Tensor:
    """Return a number of the bits of each parameter, on the device: quicker than :func:`digest`, and all but sure."""
    found = []
    for parameter in parameters.values():
        own = parameter.to_local() if is_shard(parameter) else parameter  # type: ignore[attr-defined]
        bits = own.detach().contiguous().view(-1).view(_INTEGERS[own.element_size()])
        rows = (
            bits.view(len(own) if own.ndim else 1, -1).sum(1, dtype=torch.int64)
            if own.numel()
            else bits.to(torch.int64)
        )
        # Rows count differently, so that it matters which is which. Sums are those modulo 2^64.
        found.append((rows * torch.arange(1, 2 * len(rows) + 1, 2, device=rows.device)).sum())
    return torch.stack([one.to(found[0].device) for one in found])
