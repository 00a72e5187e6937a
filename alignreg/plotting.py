"""Figures of spectra and layers. Needs matplotlib, which is imported only here and only when something is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def spectrum(eigenvalues: Tensor, layers: Mapping[str, float], axes: Any = None) -> tuple[Any, Any]:
    """Draw eigenvalues and the share of the trace that the largest hold, and bars for layers if there are any.

    Args:
        eigenvalues: descending, ``(n·c,)``.
        layers: a number for each layer.
        axes: two or three matplotlib axes; new ones by default.

    Returns:
        Figure and the sequence of axes.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the number of axes does not fit.
    """
    plots = 3 if layers else 2
    if axes is None:
        figure, axes = _pyplot().subplots(1, plots, figsize=(4 * plots, 3.2), layout="constrained")
    else:
        axes = list(axes) if hasattr(axes, "__len__") else [axes]
        if len(axes) != plots:
            raise ValueError(f"ax: expected {plots} axes, as of plt.subplots(1, {plots}), got {len(axes)}.")
        figure = axes[0].figure
    index = range(1, len(eigenvalues) + 1)
    # Centring leaves c eigenvalues that are zero up to rounding.
    above = eigenvalues[eigenvalues > 1e-8 * eigenvalues[0]]
    axes[0].loglog(index[: len(above)], above)
    axes[0].set(xlabel="index j", ylabel="eigenvalue λ_j")
    axes[1].semilogx(index, eigenvalues.cumsum(0) / eigenvalues.sum())
    axes[1].set(xlabel="k", ylabel="share of the trace in the k largest", ylim=(0, 1.02))
    if layers:
        _bars(axes[2], layers)
    return figure, axes


def layers(values: Mapping[str, float], axes: Any = None) -> tuple[Any, Any]:
    """Draw one bar a layer, the first layer on top.

    Args:
        values: alignment of each layer.
        axes: matplotlib axes; new ones by default.

    Returns:
        Figure and axes.

    Raises:
        ImportError: if matplotlib is missing.
    """
    if axes is None:
        _, axes = _pyplot().subplots(figsize=(5, 1 + 0.25 * len(values)), layout="constrained")
    _bars(axes, values)
    return axes.figure, axes


def _bars(axes: Any, values: Mapping[str, float]) -> None:
    axes.barh([layer or "(model)" for layer in values], list(values.values()))
    axes.invert_yaxis()
    axes.set(xlabel="alignment", ylabel="layer", xlim=(0, None))


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot as plt  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError("plot: expected the package matplotlib. Install it: pip install matplotlib.") from error
    return plt
