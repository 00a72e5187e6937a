"""The complexity of the path of training through the space of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from alignreg import checks, plotting
from alignreg.metrics.base import TangentMetric
from alignreg.metrics.records import digest
from alignreg.tangents.batch import as_inputs, size
from alignreg.tangents.linearization import ForwardFn
from alignreg.tangents.switches import eager


class PathHistory(NamedTuple):
    """The path so far, in float64: T + 1 records of the model, and the intervals that begin at them."""

    lengths: Tensor
    """‖δw_t‖ of the interval that begins at record t, ``(T + 1,)``; the last one is still open."""
    traces: Tensor
    """tr K at record t, summed over its batches and over ranks, ``(T + 1,)``."""
    examples: Tensor
    """The number of examples n of record t, ``(T + 1,)``."""


@final
class PathComplexity(TangentMetric):
    r"""Complexity of a training path, C = Σ_t ‖δw_t‖₂ ‖Φ_t‖_F with ‖Φ_t‖_F = √tr K_t.

    Baratin et al. ("Implicit Regularization via Neural Feature Alignment", AISTATS 2021, section 4) derive this measure
    from a bound on the Rademacher complexity of a sequence of tangent kernels. K_t is uncentered and its trace is
    exact: an update costs n·c backward passes, so use a fixed set of one to a few hundred examples.

    An ``update()`` at changed weights closes an interval and begins a *record*; updates at unchanged weights add to the
    trace of the same record. δw_t is the change of the weights from one record to the next: the chord. Call
    :meth:`step` after each optimizer step to measure the length of the path along the steps instead, which is never
    shorter. The path begins at the first update; ``reset()`` begins a new one.

    Over ranks, the traces of a record are added before the square root. Weights must be the same on all ranks, so
    lengths are counted once.

    To save a path with ``state_dict()``, call ``persistent(True)`` first; it includes the last weights, P numbers.

    ``compute`` returns a float64 scalar; ``forward`` returns 0, because a single record is not a path.

    Args:
        convention: ``"paper"`` evaluates Φ at the start of an interval; ``"official"`` evaluates it at the end, with
            tr K / n, as the paper's published code does.
        normalize_by_n: use tr K / n instead of tr K; by default as the convention does.

    The other options are those of :class:`TangentMetric`, and so are the errors.

    Example:
        >>> import torch
        >>> from alignreg.metrics import PathComplexity
        >>> net = torch.nn.Linear(3, 1, bias=False)
        >>> x = torch.eye(3)
        >>> path = PathComplexity(net)
        >>> path.update(x)
        >>> with torch.no_grad():
        ...     net.weight += torch.tensor([[3.0, 0.0, 4.0]])
        >>> path.step()
        >>> round(float(path.compute()), 4)  # 5 · √3
        8.6603
    """

    higher_is_better: bool = False
    # A path cannot be merged from the values of single batches.
    full_state_update: bool = True
    plot_lower_bound: float = 0.0
    _exact: tuple[str, ...] = ("binding", "moments", "weights")

    def __init__(
        self,
        model: nn.Module,
        *,
        convention: Literal["paper", "official"] = "paper",
        normalize_by_n: bool | None = None,
        params: str | Sequence[str] | None = None,
        forward_fn: ForwardFn | None = None,
        **metric_kwargs: Any,
    ) -> None:
        checks.choice("convention", convention, ("paper", "official"))
        normalize = convention == "official"
        if normalize_by_n is not None:
            normalize = checks.flag("normalize_by_n", normalize_by_n)
        # The records do not depend on these options, but metrics that shared them would also have to share step().
        configuration = ("path", convention, normalize)
        super().__init__(model, params=params, forward_fn=forward_fn, configuration=configuration, **metric_kwargs)
        self.convention = convention
        self.normalize_by_n = normalize
        # One row for each record: index, key of the weights, length of the interval before it, tr K, n.
        self.add_state(self._name("moments"), [], dist_reduce_fx="cat")
        # Distance since the last record; "min": the rank that recorded last has the shortest open interval.
        self.add_state(self._name("open"), torch.tensor(torch.inf, dtype=torch.float64), dist_reduce_fx="min")
        self.add_state(self._name("weights"), torch.zeros(0), dist_reduce_fx=None)

    @override
    @eager
    def update(self, inputs: Any, target: Tensor | None = None) -> None:
        """Add a batch of examples to the trace of the current record.

        Args:
            inputs: tensor, or tuple or dict of tensors, with the n examples on axis 0: the *model's inputs*.
            target: ignored, for use in a ``MetricCollection``.

        Raises:
            TypeError: if ``inputs`` or the model's output is not made of tensors.
            ValueError: if ``inputs`` carries a gradient history or is empty, or the model's output is not a finite
                ``(n, c)``.
        """
        with self._unchanged_on_error():
            batch = as_inputs(inputs)
            trace = self._features.trace(batch).to(self.device, torch.float64)
            self._follow()
            rows: list[Tensor] = self._get("moments")
            length = self._get("open") if rows else trace.new_zeros(())
            added = torch.stack([trace, trace.new_tensor(float(size(batch)))])
            if rows and not float(length) > 0:
                rows[-1] = torch.cat([rows[-1][:, :3].to(added), rows[-1][:, 3:].to(added) + added], dim=1)
                return
            # float64 represents these 48 bits exactly.
            key = int(digest(self._features.parameters)[:12], 16)
            start = trace.new_tensor([float(len(rows)), float(key), float(length)])
            rows.append(torch.cat([start, added])[None])
            self._put("open", torch.zeros_like(length))
            if not self._get("weights").numel():
                self._put("weights", self._flat_weights())

    @torch.no_grad()
    @eager
    def step(self) -> None:
        """Add the distance since the last call, or the last update, to the interval; call it after each optimizer step.

        It costs a copy of the weights and no pass of the model. Before the first update, where no path has begun, it
        does nothing but warn.
        """
        if self._is_synced:
            raise RuntimeError("step: the metric is synced over ranks. Call unsync() first.")
        if not self._get("weights").numel():
            rank_zero_warn("step: the path begins with the first update(), so this step is not counted. Call update().")
        self._follow()
        self._computed = None

    @eager
    def compute(self) -> Tensor:
        """Return C over all intervals, including the calls of ``step()`` since the last update.

        With the official convention an interval counts from the update that closes it.

        Raises:
            ValueError: if no examples were added.
            RuntimeError: if the ranks followed different paths.
        """
        with self._restored_on_error():
            return self._terms(self._history()).sum()

    def history(self) -> PathHistory:
        """Return lengths, traces and numbers of examples by record, synced over ranks like ``compute()``.

        The errors are those of :meth:`compute`.
        """
        with self._synced():
            return self._history()

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw C as it has grown, interval by interval; :func:`.plotting.path` also draws the factors of its terms.

        The arguments are those of :meth:`TangentMetric.plot`.
        """
        if val is None:
            terms = self._terms(self.history())
            val = torch.cat([terms.new_zeros(1), terms.cumsum(0)])
        return plotting.estimates(val, ax, label=type(self).__name__, bounds=(self.plot_lower_bound, None))

    def _terms(self, history: PathHistory) -> Tensor:
        """Return ‖δw_t‖‖Φ_t‖_F of each interval."""
        lengths, traces, examples = history
        features = (traces / examples if self.normalize_by_n else traces).sqrt()
        return lengths[:-1] * features[1:] if self.convention == "official" else lengths * features

    def _history(self) -> PathHistory:
        rows = self._get("moments")
        table = dim_zero_cat(rows) if len(rows) else torch.zeros(0, 5)
        if not len(table):
            raise ValueError("path complexity: no examples have been added. Call update() first.")
        firsts = (table[:, 0] == 0).nonzero().flatten().tolist()
        ranks = [table[a:b] for a, b in zip(firsts, [*firsts[1:], len(table)], strict=True)]
        # A rank may have no examples in some records; the rank with the most rows has all records.
        whole = max(ranks, key=len).clone()
        whole[:, 3:] = 0
        for other in ranks:
            _add(whole, other)
        open_length = self._get("open").to(whole)
        lengths = torch.cat([whole[1:, 2], open_length[None]])
        return PathHistory(lengths, whole[:, 3], whole[:, 4])

    def _follow(self) -> None:
        last: Tensor = self._get("weights")
        if not last.numel():
            return
        now = self._flat_weights()
        distance = torch.linalg.vector_norm(now.double() - last.to(now.device).double())
        if float(distance) > 0:
            length = self._get("open")
            self._put("open", length + distance.to(length))
            self._put("weights", now)

    def _flat_weights(self) -> Tensor:
        parts = [p.detach().flatten() for p in self._features.parameters.values()]
        return torch.cat([part.to(self.device) for part in parts])

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        if not len(self._get("moments")):
            self._put("moments", [torch.zeros(0, 5, dtype=torch.float64, device=self.device)])
        # The last weights, P numbers, are not synced: only their own rank uses them.
        reductions = self._reductions
        self._reductions = {key: value for key, value in reductions.items() if key != self._name("weights")}
        try:
            super()._sync_dist(dist_sync_fn, process_group=process_group)
        finally:
            self._reductions = reductions


def _add(whole: Tensor, other: Tensor) -> None:
    """Add the traces and examples of one rank's records to the records of the same weights."""
    at = 0
    for row in other:
        while at < len(whole) and whole[at, 1] != row[1]:
            at += 1
        if at == len(whole):
            raise RuntimeError(
                "path complexity: expected updates at the same weights on all ranks, got different weights. Call "
                "update() on every rank at the same steps, and check that the replicas are equal."
            )
        whole[at, 3:] += row[3:]
        at += 1
