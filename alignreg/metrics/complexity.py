"""Complexity of the path that training takes through the space of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from alignreg import checks, plotting
from alignreg.metrics.base import TangentMetric
from alignreg.metrics.records import digest
from alignreg.tangents.batch import as_inputs, size
from alignreg.tangents.linearization import ForwardFn
from alignreg.tangents.switches import eager


class PathHistory(NamedTuple):
    """What a path has been so far: T + 1 moments, and the intervals that they begin; float64."""

    lengths: Tensor
    """‖δw_t‖ of the interval that begins at moment t, ``(T + 1,)``; the last one is still open."""
    traces: Tensor
    """tr K at moment t, summed over its batches and over ranks, ``(T + 1,)``."""
    examples: Tensor
    """Number of examples n of moment t, ``(T + 1,)``."""


@final
class PathComplexity(TangentMetric):
    r"""Complexity of a training path, C = Σ_t ‖δw_t‖₂ ‖Φ_t‖_F with ‖Φ_t‖_F = √tr K_t.

    The measure that Baratin et al. ("Implicit Regularization via Neural Feature Alignment", AISTATS 2021, section 4)
    derive from a bound on the Rademacher complexity of a sequence of tangent kernels. K_t is uncentered and its trace
    exact: n·c backward passes an update, for a fixed probe set of one to a few hundred examples.

    ``update()`` at changed weights closes an interval and begins a *moment*; updates at unchanged weights add to the
    trace of the same moment. δw_t is the change of the weights from one moment to the next: the chord. Call
    :meth:`step` after each optimizer step to measure the length of the way along the steps instead, which is never
    shorter. The path begins at the first update; ``reset()`` begins a new one.

    Over ranks the traces of a moment are added before the root is taken, and lengths are taken once: weights are
    expected to be the same on all ranks.

    To save a path with ``state_dict()``, call ``persistent(True)`` first; it holds the last weights, P numbers.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``inputs``: tensor, or tuple or dict of tensors, with the examples on axis 0: the *model's inputs*.
    - ``target``: ignored, for use in a ``MetricCollection``.

    As output of ``compute`` it returns a float64 scalar; ``forward`` returns 0, for a moment alone is no path.

    Args:
        model: the model, possibly wrapped (DDP, ``torch.compile``, Accelerate); never registered, copied or changed.
        convention: ``"paper"`` takes Φ at the start of an interval; ``"official"`` as the paper's published code
            records it, at its end and with tr K / n.
        normalize_by_n: take tr K / n; by default as the convention does.
        params: glob pattern or patterns of parameter names.
        forward_fn: ``(model, inputs) -> (n, c)`` for models with another output.
        metric_kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: if the model is sharded (FSDP).
        ValueError: if an argument is out of range, or nothing is trainable.

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
    # The value of a batch alone cannot be merged into a path.
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
        # What is recorded does not depend on these, but metrics that shared it would also have to share step().
        configuration = ("path", convention, normalize)
        super().__init__(model, params=params, forward_fn=forward_fn, configuration=configuration, **metric_kwargs)
        self.convention = convention
        self.normalize_by_n = normalize
        # Rows (index, key of the weights, length of the interval before, tr K, n), one a moment.
        self.add_state(self._name("moments"), [], dist_reduce_fx="cat")
        # Way since the last moment. Of several ranks, the one with the latest moment has gone the least.
        self.add_state(self._name("open"), torch.tensor(torch.inf, dtype=torch.float64), dist_reduce_fx="min")
        self.add_state(self._name("weights"), torch.zeros(0), dist_reduce_fx=None)

    @eager
    def update(self, inputs: Any, target: Tensor | None = None) -> None:  # noqa: ARG002 - for collections
        """Add a batch of examples to the trace of this moment.

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
            # 48 of the bits, which float64 holds exactly.
            key = int(digest(self._features.parameters)[:12], 16)
            start = trace.new_tensor([float(len(rows)), float(key), float(length)])
            rows.append(torch.cat([start, added])[None])
            self._put("open", torch.zeros_like(length))
            if not self._get("weights").numel():
                self._put("weights", self._flat_weights())

    @torch.no_grad()
    @eager
    def step(self) -> None:
        """Add the way since the last call, or the last update, to the interval: after each optimizer step.

        It costs a copy of the weights and no pass of the model. Before the first update, where no path has begun, it
        does nothing but warn.
        """
        if self._is_synced:
            raise RuntimeError("step: the metric is synced over ranks. Call unsync() first.")
        if not self._get("weights").numel():
            rank_zero_warn("step: the path begins with the first update(), which has not come: this step is lost.")
        self._follow()
        self._computed = None

    @eager
    def compute(self) -> Tensor:
        """Return C over all intervals, those of ``step()`` since the last update included.

        With the official convention an interval counts from the update that closes it.

        Raises:
            ValueError: if no examples have come.
            RuntimeError: if ranks went different ways.
        """
        with self._restored_on_error():
            return self._terms(self._history()).sum()

    def history(self) -> PathHistory:
        """Return lengths, traces and examples by moment, synced over ranks as ``compute()`` is.

        Raises:
            ValueError: if no examples have come.
            RuntimeError: if ranks went different ways.
        """
        with self._synced():
            return self._history()

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw C as it has grown, interval by interval; :func:`.plotting.path` also draws the factors of its terms.

        Args:
            val: a result of ``compute``, or a sequence of them, to draw instead.
            ax: matplotlib axes; new ones by default.

        Returns:
            Figure and axes.

        Raises:
            ImportError: if matplotlib is missing.
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
            raise ValueError("path complexity: no examples have been added.")
        firsts = (table[:, 0] == 0).nonzero().flatten().tolist()
        ranks = [table[a:b] for a, b in zip(firsts, [*firsts[1:], len(table)], strict=True)]
        # A rank may have had no example at some moments; the longest record has them all.
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
        way = torch.linalg.vector_norm(now.double() - last.to(now.device).double())
        if float(way) > 0:
            length = self._get("open")
            self._put("open", length + way.to(length))
            self._put("weights", now)

    def _flat_weights(self) -> Tensor:
        parts = [p.detach().flatten() for p in self._features.parameters.values()]
        return torch.cat([part.to(self.device) for part in parts])

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        name = self._name("moments")
        if len(getattr(self, name)) == 0:
            setattr(self, name, [torch.zeros(0, 5, dtype=torch.float64, device=self.device)])
        # The last weights are each rank's own affair, and P numbers: they stay.
        reductions = self._reductions
        self._reductions = {key: value for key, value in reductions.items() if key != self._name("weights")}
        try:
            super()._sync_dist(dist_sync_fn, process_group=process_group)
        finally:
            self._reductions = reductions


def _add(whole: Tensor, other: Tensor) -> None:
    """Add the traces and examples of one rank's moments to those of the same weights."""
    at = 0
    for row in other:
        while at < len(whole) and whole[at, 1] != row[1]:
            at += 1
        if at == len(whole):
            raise RuntimeError(
                "path complexity: ranks recorded moments at different weights. Update on every rank at the same "
                "steps, and check that the replicas are equal."
            )
        whole[at, 3:] += row[3:]
        at += 1
