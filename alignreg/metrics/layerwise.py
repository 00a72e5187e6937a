"""Alignment of each layer's tangent kernel with the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from alignreg import checks, estimators, functional, plotting, sketches
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
    "Implicit Regularization via Neural Feature Alignment", AISTATS 2021, section 3.3). The metric takes *inputs* and
    keeps up to ``max_examples`` of them. Evaluate it at one moment of training, and ``reset()`` before the next.

    With ``method="exact"``, ``compute()`` takes the exact kernel of each layer. With ``method="sketch"``, for models or
    probe sets whose kernels are too large, it takes m + 1 backward passes of the kept examples, which serve all layers:
    yᵀK_l y = ‖Φ_lᵀ(y − ȳ)‖² is exact, and ‖K_l‖_F² is estimated without bias from the products of m probes
    Φ_lᵀω, ω Gaussian. That holds m·P numbers; :meth:`standard_error` says how far off the values may be.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``inputs``: tensor, or tuple or dict of tensors, with the examples on axis 0: the *model's inputs*, not its
      predictions. In a ``MetricCollection`` use keywords, ``update(inputs=x, preds=p, target=y)``.
    - ``target``: class indices ``(n,)``, or values ``(n, c)``; with one output, values ``(n,)``.

    As output of ``forward`` and ``compute`` it returns a dict of float64 scalars by layer, the path of the module that
    owns the parameters, or of :class:`~alignreg.estimators.Estimate` with ``return_std_error=True``: NaN for a layer
    with a zero kernel; ``forward`` also returns NaN for a batch of one class.

    Args:
        model: the model, possibly wrapped (DDP, ``torch.compile``, Accelerate); never registered, copied or
            changed. Clones of the metric watch the same live model.
        num_outputs: their number c.
        centered: center the kernels over the examples; ``False`` leaves them as they are. Targets are always centered.
        max_examples: how many examples are kept: the first ones, of several ranks in turn. The exact kernel of each
            layer has (max_examples · c)² numbers.
        method: ``"exact"`` or ``"sketch"``.
        probes: m ≥ 3 probes of the sketch; the error falls like 1/√m.
        seed: of the probes. Nothing is drawn from torch's global random state.
        return_std_error: return the standard error beside each value.
        params: glob pattern or patterns of parameter names.
        forward_fn: ``(model, inputs) -> (n, c)`` for models with another output.
        metric_kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: if the model is sharded (FSDP).
        ValueError: if an argument is out of range, or nothing is trainable.

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
        # Whatever is computed from them, the kept examples are the same.
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

    @eager
    def update(self, inputs: Any, target: Tensor) -> None:
        """Keep a batch: the model's inputs and their targets. Beyond ``max_examples`` nothing is kept.

        Raises:
            TypeError: if ``inputs`` or the model's output is not made of tensors.
            ValueError: if ``inputs`` carries a gradient history, is empty, or does not fit ``target``; if a class
                is outside [0, num_outputs); if the model's output is not a finite ``(n, num_outputs)``.
            RuntimeError: if the weights changed since the first update.
        """
        self._add(inputs, target)

    @eager
    def compute(self) -> Layers:
        """Return the alignment of each layer over all examples of all ranks.

        Raises:
            ConstantTargetError: if all examples have the same target.
            ValueError: if no examples have come.
            RuntimeError: if the weights changed since the first update.
        """
        with self._restored_on_error():
            return self._estimates() if self.return_std_error else self._values()

    @eager
    def standard_error(self) -> dict[str, Tensor]:
        """Return the standard error of each value that the sketch causes, synced over ranks as ``compute()`` is.

        It is a jackknife over the probes; zero for ``method="exact"``.

        Raises:
            ConstantTargetError: as :meth:`compute`.
            ValueError: as :meth:`compute`.
            RuntimeError: as :meth:`compute`.
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
        values = {
            layer: functional.alignment(K.to(torch.float64), kept.targets, self.centered)
            for layer, K in kernels.items()
        }
        return {layer: Estimate(value, torch.zeros_like(value)) for layer, value in values.items()}

    def _sketched(self, kept: Examples, *, errors: bool) -> dict[str, Estimate]:
        y = kept.targets - kept.targets.mean(0)
        # Each example has its own probes, however the examples were dealt to batches and ranks.
        probes = y.new_empty(self.probes, *y.shape)
        probes[:, canonical_order(kept.inputs, y)] = sketches.probes(self.probes, *y.shape, seed=self.seed, like=y)
        if self.centered:
            probes = probes - probes.mean(1, keepdim=True)
        columns = self._pullback(kept, torch.cat([y[None] / torch.linalg.vector_norm(y), probes]))
        found = {}
        for layer, names in self._features.layers.items():
            gram = estimators.gram({name: columns[name] for name in names}).to(torch.float64)
            found[layer] = _alignment(gram[0, 0], gram[1:, 1:], errors=errors)
        return found

    def _pullback(self, kept: Examples, cotangents: Tensor) -> dict[str, Tensor]:
        """Return Φᵀω by parameter ``(m, *shape)``, from batches no larger than those that came."""
        total: dict[str, Tensor] = {}
        for start in range(0, len(kept.targets), kept.batch_size):
            stop = start + kept.batch_size
            part = self._features.pullback(slice_examples(kept.inputs, start, stop), cotangents[:, start:stop])
            for name, value in part.items():
                total[name] = total[name] + value if name in total else value
        return total

    def plot(self, val: Layers | Sequence[Layers] | None = None, ax: Any = None) -> Any:
        """Draw a bar for each layer, with an error bar of ± 2 standard errors where one is known.

        Args:
            val: a result of ``forward`` or ``compute``, or a sequence of them, drawn as a heat map of layers along
                training; ``compute()`` with its standard errors by default.
            ax: matplotlib axes; new ones by default.

        Returns:
            Figure and axes.

        Raises:
            ImportError: if matplotlib is missing.
        """
        if val is None:
            with self._synced():
                val = self._estimates()
        return plotting.bars(val, ax) if isinstance(val, Mapping) else plotting.heat_map(val, ax)


def _alignment(projection: Tensor, gram: Tensor, *, errors: bool) -> Estimate:
    def alignment(gram: Tensor) -> Tensor:
        return estimators.alignment(projection, estimators.frobenius2(gram))

    value = alignment(gram)
    return Estimate(value, estimators.standard_error(alignment, gram) if errors else torch.zeros_like(value))
