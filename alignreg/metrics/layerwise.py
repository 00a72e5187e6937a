"""Alignment of each layer's tangent kernel with the targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from alignreg import functional, plotting
from alignreg.evaluation import ForwardFn
from alignreg.metrics.base import positive
from alignreg.metrics.probe_set import ProbeSetMetric
from alignreg.targets import ConstantTargetError


@final
class LayerwiseAlignment(ProbeSetMetric):
    r"""Alignment of each layer's own tangent kernel with the targets, A_l = yᵀK_l y / (‖K_l‖_F ‖y − ȳ‖²), in [0, 1].

    K_l is the kernel of the parameters that layer l owns, centred; the layers' kernels sum to K (Baratin et al.,
    "Implicit Regularization via Neural Feature Alignment", AISTATS 2021, section 3.3). The metric takes *inputs*, keeps
    up to ``max_examples`` of them, and takes their exact kernels in ``compute()``. Evaluate it at one moment of
    training, and ``reset()`` before the next.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``inputs``: tensor, or tuple or dict of tensors, with the examples on axis 0: the *model's inputs*, not its
      predictions. In a ``MetricCollection`` use keywords, ``update(inputs=x, preds=p, target=y)``.
    - ``target``: class indices ``(n,)``, or values ``(n, c)``; with one output, values ``(n,)``.

    As output of ``forward`` and ``compute`` it returns a dict of float64 scalars by layer, the path of the module that
    owns the parameters: NaN for a layer with a zero kernel; ``forward`` also returns NaN for a batch of one class.

    Args:
        model: the model, possibly wrapped (DDP, ``torch.compile``, Accelerate); never registered, copied or
            changed. Clones of the metric watch the same live model.
        num_outputs: c.
        centered: centre the kernels over the examples; ``False`` leaves them as they are. Targets are always centred.
        max_examples: how many examples are kept: the first ones, of several ranks in turn. The kernel of each layer
            has (max_examples · c)² numbers.
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
        params: str | Sequence[str] | None = None,
        forward_fn: ForwardFn | None = None,
        **metric_kwargs: Any,
    ) -> None:
        outputs, examples = positive("num_outputs", num_outputs), positive("max_examples", max_examples)
        super().__init__(
            model, params=params, forward_fn=forward_fn, configuration=(outputs, examples), **metric_kwargs
        )
        self.num_outputs, self.max_examples = outputs, examples
        self.centered = centered
        self._hold_examples()

    def update(self, inputs: Any, target: Tensor) -> None:
        """Keep a batch: the model's inputs and their targets. Beyond ``max_examples`` nothing is kept.

        Raises:
            TypeError: if ``inputs`` or the model's output is not made of tensors.
            ValueError: if ``inputs`` carries a gradient history, is empty, or does not fit ``target``; if a class
                is outside [0, num_outputs); if the model's output is not a finite ``(n, num_outputs)``.
            RuntimeError: if the weights changed since the first update.
        """
        self._add(inputs, target)

    def compute(self) -> dict[str, Tensor]:
        """Return the alignment of each layer over all examples of all ranks.

        Raises:
            ConstantTargetError: if all examples have the same target.
            ValueError: if no examples have come.
            RuntimeError: if the weights changed since the first update.
        """
        with self._restored_on_error():
            x, y = self._examples()
            kernels = self._features.kernel(x, per_layer=True)
            try:
                return {
                    layer: functional.alignment(value.to(torch.float64), y, self.centered).to(self.device)
                    for layer, value in kernels.items()
                }
            except ConstantTargetError:
                if not self._in_forward:
                    raise
                return {layer: torch.full((), torch.nan, dtype=torch.float64, device=self.device) for layer in kernels}

    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> Any:
        """Draw a bar for each layer.

        Args:
            val: a result of ``forward`` or ``compute``; ``compute()`` by default.
            ax: matplotlib axes; new ones by default.

        Returns:
            Figure and axes.

        Raises:
            ImportError: if matplotlib is missing.
        """
        found = self.compute() if val is None else val
        return plotting.layers({layer: float(value) for layer, value in found.items()}, ax)
