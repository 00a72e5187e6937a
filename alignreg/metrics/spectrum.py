"""The spectrum of the tangent kernel on a set of kept examples."""

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
    r"""Summary of the eigenvalues of the exact tangent kernel on a set of kept examples.

    These are the measures that Baratin et al. ("Implicit Regularization via Neural Feature Alignment", AISTATS 2021,
    sections 3.2 and 3.3) use to show how far tangent features are compressed to a few directions, and to which. The
    metric receives *inputs*, keeps up to ``max_examples`` of them, and evaluates their exact kernel in ``compute()``,
    without a sampling error. Evaluate it at fixed weights, and call ``reset()`` before the next evaluation.

    ``forward`` and ``compute`` return a dict of float64 scalars:

    - ``effective_rank``, ``participation_ratio``: ranks of the kernel, as in :mod:`alignreg.functional`;
    - ``trace_ratio_k`` for each k: the share of the k largest eigenvalues;
    - ``largest_eigenvalue``, ``mean_eigenvalue``, ``median_eigenvalue``, over all n·c;
    - ``alignment``: of the kernel with the targets; NaN if targets are missing or all equal;
    - with ``per_layer=True``, ``alignment/LAYER`` for the kernel of each layer's own parameters.

    Args:
        num_outputs: the number c of outputs of the model for an example.
        k: the number or numbers k of the trace ratios; a ratio with k above n·c is 1.
        per_layer: also compute the alignment of each layer. The kernels of all layers are then in memory together.
        centered: center the kernel over the examples, as the paper does.
        max_examples: how many examples to keep: the first ones, taken from several ranks in turn. The kernel has
            (max_examples · c)² numbers; the time for its eigenvalues grows as (max_examples · c)³.

    The other options and the errors are those of :class:`TangentMetric`.

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
        # The kept examples do not depend on the other options, so metrics that differ in these can share them.
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
    def compute(self) -> dict[str, Tensor]:
        """Return the summary over all examples of all ranks.

        Raises:
            ValueError: if no examples were added.
            RuntimeError: if the weights changed since the first update.
        """
        with self._restored_on_error():
            x, y, *_ = self._examples()
            layers = self._features.kernel(x, per_layer=True) if self.per_layer else {"": self._features.kernel(x)}
            kernels = {layer: kernel.to(torch.float64) for layer, kernel in layers.items()}
            K = torch.stack(list(kernels.values())).sum(0)
            eigenvalues = formulas.eigenvalues(functional.center(K) if self.centered else K).clamp(min=0)
            values = functional.summary(eigenvalues, self.k)
            values["alignment"] = self._alignment(K, y)
            if self.per_layer:
                values |= {f"alignment/{layer}": self._alignment(kernel, y) for layer, kernel in kernels.items()}
            self._spectrum = eigenvalues.cpu()
            return {name: value.to(self.device) for name, value in values.items()}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the eigenvalues, the cumulative trace, and with ``per_layer=True`` the alignment of each layer.

        If ``val`` is a sequence of results of ``forward`` or ``compute``, their two ranks are drawn as curves instead.
        A single result does not contain the spectrum, so ``compute()`` is called. ``ax`` is one matplotlib axes for
        each plot; the rest is as for :meth:`TangentMetric.plot`.
        """
        if isinstance(val, Sequence):
            ranks = [{name: one[name] for name in ("effective_rank", "participation_ratio")} for one in val]
            return plotting.estimates(ranks, ax, label="rank of the tangent kernel", bounds=(0, None))
        values = self.compute()
        assert self._spectrum is not None
        layers = {name.removeprefix("alignment/"): v for name, v in values.items() if name.startswith("alignment/")}
        return plotting.spectrum(self._spectrum, layers, ax)

    def _alignment(self, K: Tensor, y: Tensor) -> Tensor:
        if bool(y.isnan().any()):
            return K.new_full((), torch.nan)
        try:
            return functional.alignment(K, y, self.centered)
        except ConstantTargetError:
            return K.new_full((), torch.nan)
