"""The alignment of each layer's tangent kernel with the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from alignreg import checks, estimators, formulas, plotting, sketches
from alignreg.estimators import Estimate
from alignreg.metrics.probe_set import Examples, ProbeSetMetric
from alignreg.metrics.records import canonical_order
from alignreg.tangents.batch import slice_examples
from alignreg.tangents.linearization import ForwardFn
from alignreg.tangents.switches import eager
from alignreg.targets import ConstantTargetError

Layers = dict[str, Tensor] | dict[str, Estimate]


@final
class LayerwiseAlignment(ProbeSetMetric):
    r"""Alignment of each layer's own tangent kernel with the targets, A_l = yᵀK_l y / (‖K_l‖_F ‖y − ȳ‖²), in [0, 1].

    K_l is the kernel of the parameters that layer l owns, centered; the layers' kernels sum to K (Baratin et al.,
    "Implicit Regularization via Neural Feature Alignment", AISTATS 2021, section 3.3). The metric receives *inputs* and
    keeps up to ``max_examples`` of them. Evaluate it at fixed weights, and call ``reset()`` before the next evaluation.

    With ``method="exact"``, ``compute()`` evaluates the exact kernel of each layer. With ``method="sketch"``, for
    models or numbers of examples whose kernels are too large, it runs m + 1 backward passes over the kept examples,
    which serve all layers: yᵀK_l y = ‖Φ_lᵀ(y − ȳ)‖² is exact, and ‖K_l‖_F² is estimated without bias from the products
    of the pullbacks Φ_lᵀω of m Gaussian probes ω, which are orthogonal to y − ȳ because the part along it is known.
    They occupy m·P numbers; :meth:`standard_error` estimates the error.

    ``forward`` and ``compute`` return a dict with a float64 scalar for each layer (the path of the module that owns the
    parameters), or an :class:`~alignreg.estimators.Estimate` with ``return_std_error=True``. The value of a layer with
    a zero kernel is NaN; ``forward`` also returns NaN for a batch of one class.

    Args:
        num_outputs: the number c of outputs of the model for an example.
        centered: center the kernels over the examples. Targets are always centered.
        max_examples: how many examples to keep: the first ones, taken from several ranks in turn. The exact kernel of
            each layer has (max_examples · c)² numbers.
        method: ``"exact"`` or ``"sketch"``.
        probes: the number m ≥ 3 of probes of the sketch; the error falls like 1/√m.
        seed: seed of the probes. Nothing is drawn from torch's global random state.
        return_std_error: return the standard error beside each value.

    The other options and the errors are those of :class:`TangentMetric`.

    Example:
        >>> import torch
        >>> from alignreg.metrics import LayerwiseAlignment
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> metric = LayerwiseAlignment(net, num_outputs=3)
        >>> metric.update(torch.randn(20, 4), torch.randint(3, (20,)))
        >>> list(metric.compute())
        ['0', '2']
    """

    higher_is_better: bool = True
    full_state_update: bool = False
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0

    def __init__(
        self,
        model: nn.Module,
        num_outputs: int,
        *,
        centered: bool = True,
        max_examples: int = 100,
        method: Literal["exact", "sketch"] = "exact",
        probes: int = 32,
        seed: int = 0,
        return_std_error: bool = False,
        params: str | Sequence[str] | None = None,
        forward_fn: ForwardFn | None = None,
        **metric_kwargs: Any,
    ) -> None:
        outputs, examples = checks.count("num_outputs", num_outputs), checks.count("max_examples", max_examples)
        checks.choice("method", method, ("exact", "sketch"))
        probes = checks.count("probes", probes, 3, ", for an unbiased norm and its error")
        seed, centered = checks.seed(seed), checks.flag("centered", centered)
        return_std_error = checks.flag("return_std_error", return_std_error)
        # The kept examples do not depend on the other options, so metrics that differ in these can share them.
        super().__init__(
            model, params=params, forward_fn=forward_fn, configuration=("layers", outputs, examples), **metric_kwargs
        )
        self.num_outputs, self.max_examples = outputs, examples
        self.centered = centered
        self.method = method
        self.probes = probes
        self.seed = seed
        self.return_std_error = return_std_error
        self._hold_examples()

    @override
    @eager
    def update(self, inputs: Any, target: Tensor) -> None:  # type: ignore[override] # alignment needs every target
        super().update(inputs, target)

    @eager
    def compute(self) -> Layers:
        """Return the alignment of each layer over all examples of all ranks.

        Raises:
            ConstantTargetError: if all examples have the same target.
            ValueError: if no examples were added.
            RuntimeError: if the weights changed since the first update.
        """
        with self._restored_on_error():
            return self._estimates() if self.return_std_error else self._values()

    @eager
    def standard_error(self) -> dict[str, Tensor]:
        """Return the standard error of each value that is due to the sketch, synced over ranks like ``compute()``.

        It is a jackknife over the probes, and zero for ``method="exact"``. The errors are those of :meth:`compute`.
        """
        with self._synced():
            return {layer: estimate.standard_error for layer, estimate in self._estimates().items()}

    def _values(self) -> dict[str, Tensor]:
        return {layer: value for layer, (value, _) in self._estimates(errors=False).items()}

    def _estimates(self, *, errors: bool = True) -> dict[str, Estimate]:
        kept = self._examples()
        y = kept.targets
        if bool((y == y[0]).all()):
            if not self._in_forward:
                raise ConstantTargetError
            nan = torch.full((), torch.nan, dtype=torch.float64, device=self.device)
            return dict.fromkeys(self._features.layers, Estimate(nan, nan))
        found = self._sketched(kept, errors=errors) if self.method == "sketch" else self._exactly(kept)
        return {layer: Estimate(*(part.to(self.device) for part in estimate)) for layer, estimate in found.items()}

    def _exactly(self, kept: Examples) -> dict[str, Estimate]:
        kernels = self._features.kernel(kept.inputs, per_layer=True)
        y = kept.targets - kept.targets.mean(0)
        values = {layer: formulas.alignment(K, y, centered=self.centered) for layer, K in kernels.items()}
        return {layer: Estimate(value, torch.zeros_like(value)) for layer, value in values.items()}

    def _sketched(self, kept: Examples, *, errors: bool) -> dict[str, Estimate]:
        y = kept.targets - kept.targets.mean(0)
        # Examples are sorted, so that their probes do not depend on how they are split into batches and ranks.
        probes = y.new_empty(self.probes, *y.shape)
        probes[:, canonical_order(kept.inputs, y)] = sketches.probes(self.probes, *y.shape, seed=self.seed, like=y)
        if self.centered:
            probes = probes - probes.mean(1, keepdim=True)
        u = y / torch.linalg.vector_norm(y)
        probes = probes - torch.einsum("mnc,nc->m", probes, u)[:, None, None] * u
        columns = self._pullback(kept, torch.cat([u[None], probes]))
        found = {}
        for layer, names in self._features.layers.items():
            gram = estimators.gram({name: columns[name] for name in names}).to(torch.float64)
            found[layer] = _alignment(gram, errors=errors)
        return found

    def _pullback(self, kept: Examples, cotangents: Tensor) -> dict[str, Tensor]:
        """Return Φᵀω by parameter ``(m, *shape)``, from batches no larger than those received."""
        total: dict[str, Tensor] = {}
        for start in range(0, len(kept.targets), kept.batch_size):
            stop = start + kept.batch_size
            part = self._features.pullback(slice_examples(kept.inputs, start, stop), cotangents[:, start:stop])
            for name, value in part.items():
                total[name] = total[name] + value if name in total else value
        return total

    def plot(self, val: Layers | Sequence[Layers] | None = None, ax: Any = None) -> Any:
        """Draw a bar for each layer, with an error bar of ± 2 standard errors where these are known.

        A sequence is drawn as a heat map of layers along training. The arguments are those of
        :meth:`TangentMetric.plot`.
        """
        if val is None:
            with self._synced():
                val = self._estimates()
        return plotting.bars(val, ax) if isinstance(val, Mapping) else plotting.heat_map(val, ax)


def _alignment(gram: Tensor, *, errors: bool) -> Estimate:
    """Return the alignment from the products of the pullbacks of u = y/‖y‖ and of probes orthogonal to it."""

    def alignment(gram: Tensor) -> Tensor:
        return estimators.alignment(gram[0, 0], estimators.frobenius2(gram, exact=1))

    value = alignment(gram)
    return Estimate(value, estimators.standard_error(alignment, gram, exact=1) if errors else torch.zeros_like(value))
