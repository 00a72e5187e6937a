"""Kept examples as bytes, which torchmetrics can gather over ranks without knowing their structure."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignreg.distributed.sharding import is_shard
from alignreg.tangents.batch import Batch, map_tensors, tensors

_LENGTH = 8
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Record(NamedTuple):
    """A batch of examples, a digest of the weights when it was added, and the rank that received it."""

    inputs: Batch
    targets: Tensor
    groups: Tensor
    weights: str
    rank: int


def pack(record: Record) -> Tensor:
    """Return the record as one row of bytes that starts with its length, so that rows can be concatenated."""
    buffer = io.BytesIO()
    inputs = map_tensors(lambda t: t.detach().cpu(), record.inputs)
    record = record._replace(inputs=inputs, targets=record.targets.cpu(), groups=record.groups.cpu())
    torch.save(record._asdict(), buffer)
    payload = buffer.getvalue()
    return torch.frombuffer(bytearray(len(payload).to_bytes(_LENGTH, "little") + payload), dtype=torch.uint8)


def unpack(rows: Tensor) -> list[Record]:
    """Return the records in concatenated rows, without running any code in them."""
    data = rows.cpu().numpy().tobytes()
    records = []
    while data:
        end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
        records.append(Record(**torch.load(io.BytesIO(data[_LENGTH:end]), weights_only=True)))
        data = data[end:]
    return records


def canonical_order(x: Batch, y: Tensor) -> list[int]:
    """Return the indices that sort the examples by a hash of their contents."""

    def key(index: int) -> bytes:
        total = hashlib.blake2b(digest_size=16)
        for part in (*tensors(x), y):
            total.update(_bytes(part[index]))
        return total.digest()

    return sorted(range(len(y)), key=key)


def _bytes(values: Tensor) -> memoryview:
    return values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _local(parameter: Any) -> Tensor:
    """Return a parameter, or this rank's shard of it."""
    values: Tensor = parameter.to_local() if is_shard(parameter) else parameter
    return values


def digest(parameters: Mapping[str, Tensor]) -> str:
    """Return a hash of the values of the parameters; a sharded parameter counts with this rank's shard."""
    total = hashlib.blake2b(digest_size=16)
    for name, parameter in parameters.items():
        total.update(name.encode())
        total.update(_bytes(_local(parameter)))
    return total.hexdigest()


def fingerprint(parameters: Mapping[str, Tensor]) -> Tensor:
    """Return a checksum of each parameter's bits, on the device: faster than :func:`digest`, but not collision-free."""
    checksums = []
    for own in map(_local, parameters.values()):
        rows = own.detach().contiguous().view(-1).view(_INTEGERS[own.element_size()])
        if own.numel():
            rows = rows.view(len(own) if own.ndim else 1, -1).sum(1, dtype=torch.int64)
        # Odd weights make the sum depend on the order of the rows. Sums wrap modulo 2^64.
        checksums.append((rows * torch.arange(1, 2 * len(rows) + 1, 2, device=rows.device)).sum())
    return torch.stack([checksum.to(checksums[0].device) for checksum in checksums])
