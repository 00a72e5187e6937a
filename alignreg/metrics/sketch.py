"""What metrics of a stream of batches share: sums of a sketch by group, or the examples for their exact kernel."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchmetrics.utilities import rank_zero_warn

from alignreg import checks, moments, plotting, population, sketches
from alignreg.checks import deferred
from alignreg.checks.deferred import Deferred
from alignreg.distributed.sharding import reshard
from alignreg.estimators import Estimate
from alignreg.metrics import groups as group_sets
from alignreg.metrics import pulled
from alignreg.metrics.probe_set import ProbeSetMetric
from alignreg.metrics.records import fingerprint
from alignreg.metrics.seen import Kept, Sketched
from alignreg.moments import Moments
from alignreg.population import PairSums
from alignreg.tangents.batch import Batch, as_inputs, on, size
from alignreg.tangents.linearization import ForwardFn
from alignreg.tangents.switches import eager
from alignreg.targets import ConstantTargetError, encode

RANK = 4
"""Of each copy in a factored sketch, whose errors then are about those of ``sketch_dim`` directions with 2 · sketch_dim
vectors for each side (``benchmarks/scale.py``, part ``factored``)."""
SKETCH_DIM_PER_OUTPUT = 64
"""From how large a ``sketch_dim`` for each output a factored sketch is several times cheaper than directions of equal
error (``benchmarks/scale.py``, part ``factored``): it takes a pass for each output, they one for each direction."""
Value = Tensor | Estimate | dict[str, Tensor] | dict[str, Estimate]


class SketchMetric(ProbeSetMetric, ABC):
    """A number of the tangent kernel of all examples of a stream, and of each group of them.

    Features are pushed forward along random directions; raw sums of them are all that is kept (:mod:`.moments`), row
    0 of each state for all examples and a row for each group. A subclass says what number it makes of the sums, or of
    the exact kernel. Names of states carry the options that they depend on and not the subclass, so that a
    ``MetricCollection`` updates subclasses of equal options once.

    Args:
        model: the model, possibly wrapped; never registered, copied or changed. Clones watch the same live model.
        num_outputs: their number c.
        sketch_dim: m ≥ 3 directions; of a factored sketch, 2m vectors for each side of a weight.
        sketch: ``"gaussian"``, ``"factored"`` or ``"auto"``.
        seed: of the directions.
        centered: center the kernel over the examples.
        target_mean: expected mean of the targets ``(c,)``, if known.
        groups: how many groups of examples there are, or their names.
        method: ``"sketch"`` or ``"exact"``.
        params: glob pattern or patterns of parameter names.
        forward_fn: ``(model, inputs) -> (n, c)``.
        return_std_error: return the standard error beside the value.
        pairs: keep the sums of :mod:`.population` as well.
        metric_kwargs: of :class:`torchmetrics.Metric`.
    """

    full_state_update: bool = False
    _at_weights: Tensor | None = None
    """What identifies the weights that the last update saw."""
    _doubts: Sequence[Deferred] = ()
    """Of updates on a device that is not waited for before :meth:`compute`."""
    plot_lower_bound: float | None = 0.0
    _needs_targets: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        num_outputs: int,
        *,
        sketch_dim: int = 64,
        sketch: Literal["gaussian", "factored", "auto"] = "gaussian",
        seed: int = 0,
        centered: bool = True,
        target_mean: Tensor | Sequence[float] | None = None,
        groups: int | Sequence[str] | None = None,
        method: Literal["sketch", "exact"] = "sketch",
        params: str | Sequence[str] | None = None,
        forward_fn: ForwardFn | None = None,
        return_std_error: bool = False,
        pairs: bool = False,
        **metric_kwargs: Any,
    ) -> None:
        num_outputs = checks.count("num_outputs", num_outputs)
        sketch_dim = checks.count("sketch_dim", sketch_dim, 3, ", for an unbiased norm and its error")
        checks.choice("method", method, ("sketch", "exact"))
        checks.choice("sketch", sketch, ("gaussian", "factored", "auto"))
        seed, centered = checks.seed(seed), checks.flag("centered", centered)
        return_std_error = checks.flag("return_std_error", return_std_error)
        if sketch == "auto":
            sketch = "factored" if num_outputs * SKETCH_DIM_PER_OUTPUT <= sketch_dim else "gaussian"
        guess = pulled.mean_of_targets(target_mean, num_outputs)
        names = group_sets.names(groups)
        # `centered` is left out: the raw sums are the same, so both kinds do share.
        options = (sketch, sketch_dim, seed, None if guess is None else guess.tolist(), pairs)
        configuration = ("stream", method, num_outputs, len(names), options if method == "sketch" else ())
        super().__init__(
            model,
            params=params,
            forward_fn=forward_fn,
            configuration=configuration,
            gathers=method == "sketch",
            **metric_kwargs,
        )
        self.num_outputs = num_outputs
        self.sketch_dim = sketch_dim
        self.sketch = sketch if method == "sketch" else None
        self.seed = seed
        self.centered = centered
        self.groups = names
        self.method = method
        self.return_std_error = return_std_error
        self._target_mean = guess
        if method == "exact":
            self._hold_examples()
        else:
            self._hold_sums(pairs=pairs)

    @eager
    def update(self, inputs: Any, target: Tensor | None = None, group: Tensor | None = None) -> None:
        """Add a batch: the model's inputs, their targets, and with ``groups`` the group of each example.

        Args:
            inputs: tensor, tuple or dict of tensors with the n examples on axis 0.
            target: class indices ``(n,)`` or values ``(n, c)``; only alignment needs them.
            group: indices ``(n,)`` of the groups.

        Raises:
            TypeError: if ``inputs`` or the model's output is not made of tensors.
            ValueError: if ``inputs`` carries a gradient history, is empty, or does not fit ``target`` or ``group``; if
                a class is outside [0, num_outputs) or a group outside [0, groups); if the model's output is not a
                finite ``(n, num_outputs)``.
            RuntimeError: with ``method="exact"``, if the weights changed since the first update.
        """
        with self._unchanged_on_error():
            batch = as_inputs(inputs)
            members = group_sets.encode(group, len(self.groups), size(batch))
            if self.method == "exact":
                self._keep(batch, target, members)
                return
            with deferred.deferred() as doubts:
                y = None if target is None else encode(target, self.num_outputs, size(batch))
                reshard(self._features.model)
                now, before = fingerprint(self._features.parameters), self._at_weights
                if before is not None:
                    deferred.look((now != before.to(now.device)).any(), self._warn_of_change)
                sums = self._sums(batch, y, members)
            if y is None:
                sums["unlabeled"] = torch.full((), float(size(batch)), dtype=torch.float64, device=self.device)
            holds = doubts.held(self.device) if doubts else None
            for field, value in sums.items():
                state = self._get(field)
                added = state + value.to(state)
                self._put(field, added if holds is None else torch.where(holds, added, state))
            self._at_weights = now
            if doubts:
                self._doubts = [*self._doubts, doubts]

    def reset(self) -> None:
        """Forget all examples."""
        super().reset()
        if not self._in_forward:
            self._at_weights, self._doubts = None, []

    def __getstate__(self) -> dict[str, Any]:
        self._look()  # a copy has no doubts of its own
        return super().__getstate__()

    def _warn_of_change(self, changed: list[float]) -> None:
        if changed[0]:
            rank_zero_warn(
                f"The model's weights changed between updates of {type(self).__name__}: the value mixes tangent "
                "features of several moments. Call reset() whenever the weights change.",
                UserWarning,
            )

    def _look(self) -> None:
        """Look at what updates left in doubt, so as not to wait for the device; a batch that fails was not added."""
        while self._doubts:
            doubts, *self._doubts = self._doubts
            try:
                doubts.settle()
            except Exception:
                rank_zero_warn(f"A batch was left out of {type(self).__name__}, as the error says.", UserWarning)
                raise

    @eager
    def compute(self) -> Value:
        """Return the value over all batches and ranks, a dict of them with ``groups``.

        Raises:
            ConstantTargetError: if alignment is asked for and all examples have the same target.
            ValueError: if no examples have come, or alignment is asked for and some came without a target.
            RuntimeError: with ``method="exact"``, if the weights changed since the first update.
        """
        with self._restored_on_error():
            found: Value = group_sets.named(self._estimates() if self.return_std_error else self._values(), self.groups)
            return found

    @eager
    def standard_error(self) -> Tensor | dict[str, Tensor]:
        """Return the standard error of ``compute()`` that the sketch causes, synced over ranks as it is.

        It is a jackknife over the directions, or the copies of a factored sketch; value ± 2 standard errors holds the
        exact value for these examples in about 95 % of seeds. Zero for ``method="exact"``.

        Raises:
            ConstantTargetError: as :meth:`compute`.
            ValueError: as :meth:`compute`.
        """
        with self._synced():
            found: Tensor | dict[str, Tensor] = group_sets.named(self._errors(), self.groups)
            return found

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw values, with a band of ± 2 standard errors where they are known.

        Args:
            val: a result of ``forward`` or ``compute``, or a sequence of them, drawn as a curve; by default
                ``compute()`` with its standard error.
            ax: matplotlib axes; new ones by default.

        Returns:
            Figure and axes.

        Raises:
            ImportError: if matplotlib is missing.
        """
        if val is None:
            with self._synced():
                val = group_sets.named(self._estimates(), self.groups)
        return plotting.estimates(val, ax, label=type(self).__name__, bounds=self._bounds)

    @property
    def _bounds(self) -> tuple[float | None, float | None]:
        """Between which numbers to draw."""
        return self.plot_lower_bound, self.plot_upper_bound

    def _hold_sums(self, *, pairs: bool) -> None:
        """Add the states of a sketch; to be called by the constructor."""
        self._directions = (
            sketches.factored(max(3, math.ceil(2 * self.sketch_dim / RANK)), RANK, self.seed)
            if self.sketch == "factored"
            else sketches.gaussian(self.sketch_dim, self.seed)
        )
        self._fields: tuple[type[Moments] | type[PairSums], ...] = (Moments, PairSums) if pairs else (Moments,)
        start = moments.zeros(self.num_outputs, self._directions.m, pulled.length(self._features))._asdict()
        if pairs:
            start |= population.zeros(self.num_outputs, self._directions.m)._asdict()
            self._exact = (*self._exact, *start)  # differences of far larger sums
        for field, value in start.items():
            rows = value.new_zeros(1 + len(self.groups), *value.shape)
            self.add_state(self._name(field), rows, dist_reduce_fx="sum")
        self.add_state(self._name("unlabeled"), torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @abstractmethod
    def _of_sketch(self, seen: Sketched) -> Tensor:
        """Return the number from a sketch, whose standard error follows by leaving columns out."""

    @abstractmethod
    def _of_kernel(self, seen: Kept) -> Tensor:
        """Return the number from the exact kernel."""

    def _estimates(self) -> list[Estimate]:
        return [Estimate(*pair) for pair in zip(self._values(), self._errors(), strict=True)]

    def _values(self) -> list[Tensor]:
        if self.method == "sketch":
            return self._each(lambda *sums: self._of_sketch(self._sketched(*sums)), self._moments())
        kept = self._examples()
        if self._needs_targets:
            _require_targets(int(kept.targets.isnan().any(1).sum()), len(kept.targets))
        K = self._features.kernel(kept.inputs).to(torch.float64)
        y = kept.targets.to(K)
        sets = [rows.to(K.device) for rows in group_sets.sets(kept.groups, len(self.groups))]
        seen = [Kept(K[rows][:, :, rows], y[rows], self.centered) if len(rows) else None for rows in sets]
        return self._each(self._of_kernel, [one and (one,) for one in seen])

    def _errors(self) -> list[Tensor]:
        if self.method == "sketch":
            return self._each(self._error, self._moments())
        return [torch.zeros((), dtype=torch.float64, device=self.device)] * (1 + len(self.groups))

    def _error(self, *sums: Any) -> Tensor:
        return self._sketched(*sums).standard_error(self._of_sketch)

    def _sketched(self, sums: Moments, pairs: PairSums | None = None) -> Sketched:
        unknown = torch.full_like(sums.n, torch.nan)
        return Sketched(
            gram=sums.centered() if self.centered else sums.gram,
            numerators=moments.numerators(sums),
            pairs=None if pairs is None else population.columns(sums, pairs),
            rows=sums.n * self.num_outputs,
            variance=moments.require_different_targets(sums) if self._needs_targets else unknown,
            block=self._directions.block_size,
        )

    def _each(self, number: Callable[..., Tensor], samples: Sequence[tuple[Any, ...] | None]) -> list[Tensor]:
        """Return the number of all examples and of each group, NaN where a group has none."""
        found = []
        for index, sample in enumerate(samples):
            value = torch.full((), torch.nan, dtype=torch.float64)
            try:
                if sample is not None:
                    value = number(*sample)
            except ConstantTargetError:
                if index == 0 and not self._in_forward:
                    raise
            found.append(value.to(self.device))
        return found

    def _moments(self) -> list[tuple[Any, ...] | None]:
        self._look()
        kinds = []
        for kind in self._fields:
            columns = [self._get(field).to(torch.float64) for field in kind._fields]
            kinds.append([kind(*row) for row in zip(*columns, strict=True)])
        counts = self._get("n").long().tolist()
        if not counts[0]:
            raise ValueError(f"{type(self).__name__}: no examples have been added. Call update() first.")
        if self._needs_targets:
            _require_targets(int(self._get("unlabeled")), counts[0])
        return [sample if count else None for count, sample in zip(counts, zip(*kinds, strict=True), strict=True)]

    def _sums(self, batch: Batch, y: Tensor | None, members: Tensor) -> dict[str, Tensor]:
        z = self._features.pushforward(batch, self._directions)
        self._check_width(z)
        z, sets = z.to(self.device), [on(rows, self.device) for rows in group_sets.sets(members, len(self.groups))]
        if y is None:
            back = z.new_zeros(len(sets), pulled.length(self._features))
            guesses = z.new_zeros(len(sets), self.num_outputs)
            y = z.new_zeros(z.shape[:2])
        else:
            y = on(y, self.device)
            guesses = pulled.guesses(y, sets, self._target_mean)
            back = pulled.pullbacks(self._features, batch, y, sets, guesses, seed=self.seed)
        parts = [
            moments.of(z[rows], y[rows], pullback=a, guess=guess)._asdict()
            for rows, a, guess in zip(sets, back, guesses, strict=True)
        ]
        if PairSums in self._fields:
            parts = [part | population.of(z[rows], y[rows])._asdict() for part, rows in zip(parts, sets, strict=True)]
        return {field: torch.stack([part[field] for part in parts]) for field in parts[0]}


def _require_targets(missing: int, n: int) -> None:
    if missing:
        raise ValueError(
            f"target: alignment needs the targets of all examples, {missing} of {n} came without. "
            "Call update(inputs, target)."
        )
