"""The base class of all metrics: it refers to the live model, names the states, and keeps them intact on errors."""

from __future__ import annotations

import hashlib
from abc import ABC
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from alignreg.distributed.sharding import is_sharded
from alignreg.distributed.wrappers import unwrap
from alignreg.tangents import TangentFeatures
from alignreg.tangents.linearization import ForwardFn
from alignreg.tangents.switches import eager


class TangentMetric(Metric, ABC):
    """A metric that receives inputs and runs the live model on them.

    torchmetrics lets metrics with equal states share one update. State names therefore carry the configuration, and one
    state identifies the model and its ``forward_fn``, so that metrics whose states may come to differ never share.

    Args:
        model: the model, possibly wrapped (DDP, ``torch.compile``, Accelerate). It is never registered, copied or
            changed; clones of the metric watch the same live model.
        params: glob pattern or patterns of the names of the parameters to use; by default all trainable ones.
        forward_fn: ``(model, inputs) -> (n, c)``, for models with another output.
        configuration: the kind of the states and everything else they depend on, with a ``repr`` that identifies it.
        gathers: accept a model under ``fully_shard``, which all ranks must then evaluate together.
        metric_kwargs: options of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: if the model is sharded, unless by ``fully_shard`` with ``gathers=True``.
        ValueError: if an argument is out of range, or no parameter is trainable.
    """

    is_differentiable: bool = False
    _exact: tuple[str, ...] = ("binding",)
    """The states that must keep their dtype."""

    def __init__(
        self,
        model: nn.Module,
        *,
        params: str | Sequence[str] | None,
        forward_fn: ForwardFn | None,
        configuration: tuple[Any, ...],
        gathers: bool = False,
        **metric_kwargs: Any,
    ) -> None:
        super().__init__(**metric_kwargs)
        self._gathers = gathers
        self._require_whole(model)
        self._features = TangentFeatures(model, params=params, forward_fn=forward_fn)
        self._in_forward = False
        shapes = {name: tuple(p.shape) for name, p in self._features.parameters.items()}
        key = repr((shapes, configuration))
        self._fingerprint = hashlib.blake2b(key.encode(), digest_size=6).hexdigest()
        self.add_state(self._name("binding"), self._binding(), dist_reduce_fx="max")

    def bind(self, model: nn.Module) -> None:
        """Watch ``model`` from now on. Call it after unpickling, which drops the model.

        Raises:
            ValueError: if the selected parameters of ``model`` differ in name or shape.
        """
        self._require_whole(model)
        self._features.bind(model)
        self._defaults[self._name("binding")] = self._binding().to(self.device)
        self._put("binding", self._binding().to(self.device))

    @eager
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch and return the value of that batch alone."""
        # torchmetrics resets the states to compute the value of the batch, and would lose them if the update raised.
        before = {key: list(v) if isinstance(v, list) else v for key, v in self.__dict__.items()}
        self._in_forward = True
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            self.__dict__.update(before)
            raise
        finally:
            self._in_forward = False

    def set_dtype(self, dst_type: str | torch.dtype) -> TangentMetric:
        """Keep the sums in ``torch.float64`` (the default) or ``torch.float32``, without converting the model.

        Raises:
            ValueError: for another dtype, which is too coarse for sums over many examples.
        """
        known = {str(dtype): dtype for dtype in (torch.float32, torch.float64)}
        tensor_types = {"torch.FloatTensor": "torch.float32", "torch.DoubleTensor": "torch.float64"}
        dtype = known.get(tensor_types.get(str(dst_type), str(dst_type)))
        if dtype is None:
            raise ValueError(f"set_dtype: expected torch.float32 or torch.float64 for the sums, got {dst_type!r}.")
        names = [name for name in map(self._name, self._exact) if name in self._defaults]
        states, defaults = ({name: source[name] for name in names} for source in (self.__dict__, self._defaults))
        super().set_dtype(dtype)
        self.__dict__.update(states)
        self._defaults.update(defaults)
        return self

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw a value of the metric.

        Args:
            val: a result of ``forward`` or ``compute``, or a sequence of results; ``compute()`` by default.
            ax: matplotlib axes; new ones by default.

        Returns:
            The figure and the axes.

        Raises:
            ImportError: if matplotlib is missing.
        """
        raise NotImplementedError

    @override
    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the state of a metric with the same options.

        Raises:
            ValueError: if its options differ.
        """
        theirs = incoming_state.metric_state if isinstance(incoming_state, Metric) else incoming_state
        if not self._defaults.keys() <= theirs.keys():
            raise ValueError(
                f"merge_state: expected the state of a {type(self).__name__} with the same options, got another. Give "
                "both the same parameters, sizes, seed and pilot."
            )
        super().merge_state(incoming_state)

    def _require_whole(self, model: nn.Module) -> None:
        if not self._gathers and is_sharded(unwrap(model)):
            raise TypeError(
                "model: expected whole parameters, got parameters sharded by fully_shard, which this metric does not "
                "gather. Use TangentAlignment, TangentTrace or TangentParticipationRatio with "
                'method="sketch", or pass a gathered copy.'
            )

    def _name(self, field: str) -> str:
        return f"{field}_{self._fingerprint}"

    def _get(self, field: str) -> Any:
        return getattr(self, self._name(field))

    def _put(self, field: str, value: Any) -> None:
        setattr(self, self._name(field), value)

    def _binding(self) -> Tensor:
        # torchmetrics compares states up to a tolerance, which four 16-bit words exceed wherever they differ.
        identity = f"{id(self._features.model)}/{id(self._features.forward_fn)}"
        key = hashlib.blake2b(identity.encode(), digest_size=8).digest()
        return torch.tensor([int.from_bytes(key[i : i + 2], "little") for i in range(0, 8, 2)])

    @contextmanager
    def _synced(self) -> Iterator[None]:
        """Sync the states over ranks inside the ``with`` block, as torchmetrics does for ``compute()``."""
        synced = self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        )
        with synced, self._restored_on_error():
            yield

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._update_count -= 1  # torchmetrics counts before it updates
            raise

    @contextmanager
    def _restored_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # torchmetrics would continue with the sums of all ranks in place of this rank's own.
            if self._is_synced and self._should_unsync:
                self.unsync()
            raise
