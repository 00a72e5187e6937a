"""Spectrum of the tangent kernel on a set of probe examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from alignreg import checks, formulas, functional, plotting
from alignreg.metrics.probe_set import ProbeSetMetric
from alignreg.tangents.linearization import ForwardFn
from alignreg.tangents.switches import eager
from alignreg.targets import ConstantTargetError


@final
class TangentSpectrum(ProbeSetMetric):
    r"""Eigenvalues of the exact tangent kernel on a set of probe examples, in the numbers that people follow.

    The paper's measures of how far tangent features have been compressed to a few directions, and which (Baratin et
    al., "Implicit Regularization via Neural Feature Alignment", AISTATS 2021, sections 3.2 and 3.3). The metric takes
    *inputs*, keeps up to ``max_examples`` of them, and takes their exact kernel in ``compute()``: no sampling error.
    Evaluate it at one moment of training, and ``reset()`` before the next.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``inputs``: tensor, or tuple or dict of tensors, with the examples on axis 0: the *model's inputs*, not its
      predictions. In a ``MetricCollection`` use keywords, ``update(inputs=x, preds=p, target=y)``.
    - ``target``: class indices ``(n,)``, or values ``(n, c)``; with one output, values ``(n,)``. May be left out.

    As output of ``forward`` and ``compute`` it returns a dict of float64 scalars:

    - ``effective_rank``, ``participation_ratio``: of the kernel, :mod:`alignreg.functional`;
    - ``trace_ratio_k`` for each k: the share of the k largest eigenvalues;
    - ``largest_eigenvalue``, ``mean_eigenvalue``, ``median_eigenvalue``, over all n·c;
    - ``alignment``: of the kernel with the targets; NaN without targets or if all are equal;
    - with ``per_layer=True``, ``alignment/LAYER`` for the kernel of each layer's own parameters.

    Args:
        model: the model, possibly wrapped (DDP, ``torch.compile``, Accelerate); never registered, copied or
            changed. Clones of the metric watch the same live model.
        num_outputs: their number c.
        k: for which trace ratios; with more than n·c they are 1.
        per_layer: whether to give the alignment of each layer. The kernels of all layers are then held together.
        centered: center the kernel over the examples, as the paper does; ``False`` leaves it as it is.
        max_examples: how many examples are kept: the first ones, of several ranks in turn. The kernel has
            (max_examples · c)² numbers, and its eigenvalues take the cube of that in time.
        params: glob pattern or patterns of parameter names.
        forward_fn: ``(model, inputs) -> (n, c)`` for models with another output.
        metric_kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: if the model is sharded (FSDP).
        ValueError: if an argument is out of range, or nothing is trainable.

    Example:
        >>> import torch
        >>> from alignreg.metrics import TangentSpectrum
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> metric = TangentSpectrum(net, num_outputs=3, k=(5,))
        >>> metric.update(torch.randn(20, 4), torch.randint(3, (20,)))
        >>> found = metric.compute()
        >>> bool(1 <= found["participation_ratio"] <= found["effective_rank"] <= 60)
        True
    """

    higher_is_better: bool | None = None
    full_state_update: bool = False

    def __init__(
        self,
        model: nn.Module,
        num_outputs: int,
        *,
        k: int | Sequence[int] = (10, 20, 40),
        per_layer: bool = False,
        centered: bool = True,
        max_examples: int = 100,
        params: str | Sequence[str] | None = None,
        forward_fn: ForwardFn | None = None,
        **metric_kwargs: Any,
    ) -> None:
        ratios = tuple(checks.count("k", value) for value in checks.each(k))
        outputs, examples = checks.count("num_outputs", num_outputs), checks.count("max_examples", max_examples)
        per_layer, centered = checks.flag("per_layer", per_layer), checks.flag("centered", centered)
        # Whatever is computed from them, the kept examples are the same.
        super().__init__(
            model, params=params, forward_fn=forward_fn, configuration=("spectrum", outputs, examples), **metric_kwargs
        )
        self.num_outputs, self.max_examples = outputs, examples
        self.k = ratios
        self.per_layer = per_layer
        self.centered = centered
        self._spectrum: Tensor | None = None
        self._hold_examples()

    @eager
    def update(self, inputs: Any, target: Tensor | None = None) -> None:
        """Keep a batch: the model's inputs and their targets. Beyond ``max_examples`` nothing is kept.

        Raises:
            TypeError: if ``inputs`` or the model's output is not made of tensors.
            ValueError: if ``inputs`` carries a gradient history, is empty, or does not fit ``target``; if a class
                is outside [0, num_outputs); if the model's output is not a finite ``(n, num_outputs)``.
            RuntimeError: if the weights changed since the first update.
        """
        self._add(inputs, target)

    @eager
    def compute(self) -> dict[str, Tensor]:
        """Return the numbers over all examples of all ranks.

        Raises:
            ValueError: if no examples have come.
            RuntimeError: if the weights changed since the first update.
        """
        with self._restored_on_error():
            x, y, *_ = self._examples()
            layers = self._features.kernel(x, per_layer=True) if self.per_layer else {"": self._features.kernel(x)}
            kernels = {layer: value.to(torch.float64) for layer, value in layers.items()}
            K = torch.stack(list(kernels.values())).sum(0)
            eigenvalues = formulas.eigenvalues(functional.center(K) if self.centered else K).clamp(min=0)
            found = functional.summary(eigenvalues, self.k)
            found["alignment"] = self._alignment(K, y)
            if self.per_layer:
                found |= {f"alignment/{layer}": self._alignment(value, y) for layer, value in kernels.items()}
            self._spectrum = eigenvalues.cpu()
            return {name: value.to(self.device) for name, value in found.items()}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the eigenvalues, the cumulative trace, and with ``per_layer=True`` the alignment of each layer.

        Args:
            val: a sequence of results of ``forward`` or ``compute``, whose ranks are then drawn as curves instead. A
                single result does not hold the spectrum, which ``compute()`` gives.
            ax: as many matplotlib axes as there are plots; new ones by default.

        Returns:
            Figure and axes.

        Raises:
            ImportError: if matplotlib is missing.
        """
        if isinstance(val, Sequence):
            ranks = [{name: one[name] for name in ("effective_rank", "participation_ratio")} for one in val]
            return plotting.estimates(ranks, ax, label="rank of the tangent kernel", bounds=(0, None))
        found = self.compute()
        assert self._spectrum is not None
        layers = {name.removeprefix("alignment/"): v for name, v in found.items() if name.startswith("alignment/")}
        return plotting.spectrum(self._spectrum, layers, ax)

    def _alignment(self, K: Tensor, y: Tensor) -> Tensor:
        if bool(y.isnan().any()):
            return K.new_full((), torch.nan)
        try:
            return functional.alignment(K, y, self.centered)
        except ConstantTargetError:
            return K.new_full((), torch.nan)
