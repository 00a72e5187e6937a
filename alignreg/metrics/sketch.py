"""The base class of metrics over a stream of batches, from sums of a sketch or from the exact kernel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from alignreg import checks, moments, plotting, population
from alignreg.checks import deferred
from alignreg.checks.deferred import Deferred
from alignreg.distributed.sharding import reshard
from alignreg.estimators import Estimate
from alignreg.metrics import directions, pulled
from alignreg.metrics import groups as group_sets
from alignreg.metrics import pilot as pilots
from alignreg.metrics.probe_set import ProbeSetMetric
from alignreg.metrics.records import fingerprint
from alignreg.metrics.seen import Kept, Sketched
from alignreg.moments import Moments
from alignreg.population import PairSums
from alignreg.tangents.batch import Batch, as_inputs, on, size
from alignreg.tangents.linearization import ForwardFn
from alignreg.tangents.switches import eager
from alignreg.targets import ConstantTargetError, encode

Value = Tensor | Estimate | dict[str, Tensor] | dict[str, Estimate]


class SketchMetric(ProbeSetMetric, ABC):
    r"""A number computed from the tangent kernel of a stream of examples, and of each group of them.

    The metric receives *inputs*, runs the live model on them, and accumulates over batches and ranks; the result
    belongs to all examples together, however they are split into batches. Evaluate it at fixed weights, and call
    ``reset()`` before the next evaluation.

    With ``method="sketch"``, the features are pushed forward along m directions, the same for all batches and ranks.
    The leading directions of a *pilot*, a few examples, are counted exactly. Random directions estimate only the rest,
    which is unbiased and several times closer (after "Hutch++", Meyer et al. 2021). The states are raw sums
    (:mod:`.moments`) of m² + P numbers, however many examples come; :meth:`standard_error` estimates the error. An
    update costs about a backward pass for each output, or a forward pass for each direction if there are many outputs;
    the first one also finds the pilot. With ``method="exact"``, the inputs are kept and ``compute()`` evaluates the
    exact kernel, which is feasible for up to a few thousand rows n·c.

    With ``groups``, ``update(inputs, target, group)`` also gives the number for each group (easy and difficult
    examples, domains), with its own centering, from the same pushforward. Each group adds m² + P numbers to the state,
    and a backward pass for each batch in which some but not all examples belong to it.

    State names depend on the options and not on the subclass. In a ``MetricCollection``, :class:`TangentAlignment`,
    :class:`TangentTrace` and :class:`TangentParticipationRatio` with equal options therefore share one pushforward from
    their second update on. ``forward`` does not share: each metric runs its own.

    ``forward`` and ``compute`` return a float64 scalar, or an :class:`~alignreg.estimators.Estimate` (value,
    standard_error) with ``return_std_error=True``. With ``groups`` they return a dict of these by group, with the key
    ``"total"`` for all examples; the value of a group without examples is NaN.

    Args:
        model: the model, possibly wrapped, as for :class:`TangentMetric`.
        num_outputs: the number c of outputs of the model for an example.
        sketch_dim: the number m ≥ 3 of directions; the error falls at least like 1/√m.
        sketch: ``"rademacher"`` or ``"gaussian"``: directions of random signs or of normal numbers. ``"factored"``: for
            each weight, products of random vectors on either side, combined 4 by 4, with about the same error; the
            state has (8m)² + P numbers. ``"auto"``: factored for up to m/64 outputs. The attribute ``sketch`` tells.
        pilot: the inputs of a few examples; ``True`` for the first 32 of the first update (of rank 0, which sends the
            directions to the others); ``False`` for random directions only. Half of the directions are the pilot's, at
            most m − 24 and 2²⁷/P, and none in half precision; the attribute ``pilots`` is their number. Metrics whose
            states are merged need the same inputs, or lose what their pilots give.
        seed: seed of the directions. Nothing is drawn from torch's global random state.
        centered: center the kernel over the examples, each group by itself. Targets are always centered.
        target_mean: expected mean of the targets ``(c,)``, if known; by default the mean of each batch. It changes only
            the error of the sketch, and only slightly.
        groups: the number of groups of examples, or their names.
        method: ``"sketch"`` or ``"exact"``.
        params: glob pattern or patterns of the names of the parameters to use; by default all trainable ones.
        forward_fn: ``(model, inputs) -> (n, c)``, for models with another output.
        return_std_error: return the standard error beside the value.
        pairs: also keep the sums of :mod:`.population`; an option for subclasses.
        metric_kwargs: options of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: if the model is sharded other than by ``fully_shard``, or at all with ``method="exact"``.
        ValueError: if an argument is out of range, or no parameter is trainable.
    """

    full_state_update: bool = False
    _at_weights: Tensor | None = None
    """The fingerprint of the weights at the last update."""
    _doubts: Sequence[Deferred] = ()
    """Checks of updates on a device that is not waited for before :meth:`compute`."""
    plot_lower_bound: float | None = 0.0
    _needs_targets: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        num_outputs: int,
        *,
        sketch_dim: int = 64,
        sketch: Literal["rademacher", "gaussian", "factored", "auto"] = "rademacher",
        pilot: Any = True,
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
        kind = directions.choose(sketch, num_outputs, sketch_dim)
        seed, centered = checks.seed(seed), checks.flag("centered", centered)
        return_std_error = checks.flag("return_std_error", return_std_error)
        examples = pilots.given(pilot) if method == "sketch" else False
        guess = pulled.mean_of_targets(target_mean, num_outputs)
        names = group_sets.names(groups)
        number = pilots.most(examples, sketch_dim)
        # Without a pilot the raw sums do not depend on `centered`, so metrics that differ in it can share them.
        about = (pilots.key(examples), centered) if number else ()
        options = (kind, sketch_dim, about, seed, None if guess is None else guess.tolist(), pairs)
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
        self.sketch = kind if method == "sketch" else None
        self.seed = seed
        self.centered = centered
        self.groups = names
        self.method = method
        self.return_std_error = return_std_error
        self.pilots = pilots.fitting(number, self._features)
        self._source = pilots.Source(examples, self.pilots, centered=centered)
        self._target_mean = guess
        if method == "exact":
            self._hold_examples()
        else:
            self._hold_sums(pairs=pairs)

    @eager
    def update(self, inputs: Any, target: Tensor | None = None, group: Tensor | None = None) -> None:
        """Add a batch of examples.

        Args:
            inputs: tensor, or tuple or dict of tensors, with the n examples on axis 0: the *model's inputs*, not its
                predictions. In a ``MetricCollection`` use keywords, ``update(inputs=x, preds=p, target=y)``.
            target: class indices ``(n,)`` or values ``(n, c)``; with one output, values ``(n,)``. Only alignment needs
                them.
            group: with ``groups``, the index of the group of each example, ``(n,)``.

        Raises:
            TypeError: if ``inputs`` or the model's output is not made of tensors.
            ValueError: if ``inputs`` carries a gradient history, is empty, or does not fit ``target`` or ``group``; if
                a class is outside [0, num_outputs) or a group outside [0, groups); if the model's output is not a
                finite ``(n, num_outputs)``.
            RuntimeError: with ``method="exact"``, if the weights changed since the first update.
        """
        with self._unchanged_on_error(), self._source.restored_on_error():
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
                self._settle_pilot(batch)
                sums = self._sums(batch, y, members)
            if y is None:
                sums["unlabeled"] = torch.full((), float(size(batch)), dtype=torch.float64, device=self.device)
            holds = doubts.held(self.device) if doubts else None
            for field, value in sums.items():
                state = self._get(field)
                added = state + value.to(state)
                self._put(field, added if holds is None else torch.where(holds, added, state))
            for name, bound in (("overlap_min", torch.minimum), ("overlap_max", torch.maximum)) if self.pilots else ():
                self._put(name, bound(self._get(name), self._source.overlap.to(self._get(name))))
            self._at_weights = now
            if doubts:
                self._doubts = [*self._doubts, doubts]

    @override
    def reset(self) -> None:
        super().reset()
        if not self._in_forward:
            self._at_weights, self._doubts, self._source.pilot = None, [], None

    def __getstate__(self) -> dict[str, Any]:
        self._look()  # so that a copy carries no pending checks
        return super().__getstate__()

    def _warn_of_change(self, changed: list[float]) -> None:
        if changed[0]:
            rank_zero_warn(
                f"The model's weights changed between updates of {type(self).__name__}: the value mixes tangent "
                "features at different weights. Call reset() whenever the weights change.",
                UserWarning,
            )

    def _look(self) -> None:
        """Read the checks that updates deferred to avoid waiting for the device. A batch that fails was not added."""
        while self._doubts:
            doubts, *self._doubts = self._doubts
            try:
                doubts.settle()
            except Exception:
                rank_zero_warn(f"A batch was left out of {type(self).__name__}: see the error.", UserWarning)
                raise

    @eager
    def compute(self) -> Value:
        """Return the value over all batches and ranks; with ``groups``, a dict of values.

        Raises:
            ConstantTargetError: if alignment is requested and all examples have the same target.
            ValueError: if no examples were added, or if alignment is requested and some have no target.
            RuntimeError: with ``method="exact"``, if the weights changed since the first update.
        """
        with self._restored_on_error():
            value: Value = group_sets.named(self._estimates() if self.return_std_error else self._values(), self.groups)
            return value

    @eager
    def standard_error(self) -> Tensor | dict[str, Tensor]:
        """Return the standard error of ``compute()`` that is due to the sketch, synced over ranks in the same way.

        It is a jackknife over the random directions, or the copies of a factored sketch; zero for ``method="exact"``.
        For about 95 % of seeds, ± 2 standard errors hold the exact value. The errors are those of :meth:`compute`.
        """
        with self._synced():
            errors: Tensor | dict[str, Tensor] = group_sets.named(self._errors(), self.groups)
            return errors

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw values, with a band of ± 2 standard errors where these are known; a sequence is drawn as a curve.

        The arguments are those of :meth:`TangentMetric.plot`.
        """
        if val is None:
            with self._synced():
                val = group_sets.named(self._estimates(), self.groups)
        return plotting.estimates(val, ax, label=type(self).__name__, bounds=self._bounds)

    @property
    def _bounds(self) -> tuple[float | None, float | None]:
        """The range of the values, for plots."""
        return self.plot_lower_bound, self.plot_upper_bound

    def _hold_sums(self, *, pairs: bool) -> None:
        """Add the states of a sketch. The constructor calls this."""
        self._directions = directions.draw(self.sketch, self.sketch_dim - self.pilots, self.seed)
        columns = self.pilots + self._directions.m
        self._fields: tuple[type[Moments] | type[PairSums], ...] = (Moments, PairSums) if pairs else (Moments,)
        start = moments.zeros(self.num_outputs, columns, pulled.length(self._features))._asdict()
        if pairs:
            start |= population.zeros(self.num_outputs, columns)._asdict()
            self._exact = (*self._exact, *start)  # the values are small differences of these large sums
        for bound, value in (("min", torch.inf), ("max", -torch.inf)) if self.pilots else ():
            overlap = torch.full((self.pilots, self._directions.m), value, dtype=torch.float64)
            self.add_state(self._name(f"overlap_{bound}"), overlap, dist_reduce_fx=bound)
        for field, value in start.items():
            rows = value.new_zeros(1 + len(self.groups), *value.shape)
            self.add_state(self._name(field), rows, dist_reduce_fx="sum")
        self.add_state(self._name("unlabeled"), torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @abstractmethod
    def _of_sketch(self, seen: Sketched) -> Tensor:
        """Return the number from a sketch; its standard error follows from leaving columns out."""

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
        exact = self.pilots if len(sums.guess) == self.pilots + self._directions.m else 0
        return Sketched(
            gram=sums.centered() if self.centered else sums.gram,
            numerators=moments.numerators(sums, exact),
            pairs=None if pairs is None else population.columns(sums, pairs, exact),
            rows=sums.n * self.num_outputs,
            variance=moments.require_different_targets(sums) if self._needs_targets else unknown,
            block=self._directions.block_size,
            exact=exact,
        )

    def _each(self, number: Callable[..., Tensor], samples: Sequence[tuple[Any, ...] | None]) -> list[Tensor]:
        """Return the number for all examples and for each group; NaN for a group without examples."""
        values = []
        for index, sample in enumerate(samples):
            value = torch.full((), torch.nan, dtype=torch.float64)
            try:
                if sample is not None:
                    value = number(*sample)
            except ConstantTargetError:
                if index == 0 and not self._in_forward:
                    raise
            values.append(value.to(self.device))
        return values

    def _settle_pilot(self, batch: Batch | None) -> None:
        """Find the pilot of the first update, the same on all ranks: that of the first one."""
        if self.pilots and self._source.pilot is None:
            pilot = self._source.find(self._features, batch, self._directions)
            shared = self.sync_on_compute and self.distributed_available_fn and self.distributed_available_fn()
            self._source.pilot = pilots.agree(pilot, self.process_group) if shared else pilot

    @override
    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        if self.method == "sketch":
            self._settle_pilot(None)  # others wait for a rank that has no examples
        super()._sync_dist(dist_sync_fn, process_group=process_group)

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
        if self.pilots:
            overlap = self._get("overlap_min"), self._get("overlap_max")
            whole = [sums for sums in kinds[0] if isinstance(sums, Moments)]
            kinds[0] = [pilots.without_overlap(sums, *overlap, replaceable=len(kinds) == 1) for sums in whole]
        return [sample if count else None for count, sample in zip(counts, zip(*kinds, strict=True), strict=True)]

    def _sums(self, batch: Batch, y: Tensor | None, members: Tensor) -> dict[str, Tensor]:
        z = self._features.pushforward(batch, self._source.join(self._directions))
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
            z = self._source.project(z)
            parts = [part | population.of(z[rows], y[rows])._asdict() for part, rows in zip(parts, sets, strict=True)]
        return {field: torch.stack([part[field] for part in parts]) for field in parts[0]}


def _require_targets(missing: int, n: int) -> None:
    if missing:
        raise ValueError(
            f"target: expected the targets of all examples for alignment, {missing} of {n} came without. "
            "Call update(inputs, target)."
        )
