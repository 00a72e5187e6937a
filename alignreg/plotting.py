"""Figures of values, spectra and layers. Needs matplotlib, imported only here, when something is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from alignreg.estimators import Estimate

Value = Tensor | Estimate | Mapping[str, "Tensor | Estimate"]


def estimates(
    values: Value | Sequence[Value], axes: Any, label: str, bounds: tuple[float | None, float | None]
) -> tuple[Any, Any]:
    """Draw values: points with error bars, or curves with bands, of ± 2 standard errors where these are known.

    Args:
        values: a scalar, an estimate, or a dict of them; or a sequence of these, drawn as curves.
        axes: matplotlib axes; new ones by default.
        label: what the values are.
        bounds: between which they lie, as far as that is known.

    Returns:
        Figure and axes.

    Raises:
        ImportError: if matplotlib is missing.
    """
    if axes is None:
        _, axes = _pyplot().subplots(figsize=(5, 3.2), layout="constrained")
    single = isinstance(values, (Estimate, Mapping)) or (isinstance(values, Tensor) and values.ndim == 0)
    curves = _by_name([values] if single else list(values))
    for index, (name, curve) in enumerate(curves.items()):
        points = [float(value) for value, _ in curve]
        errors = [2 * float(error) for _, error in curve]
        steps = [index] if single else list(range(len(points)))
        if single:
            axes.errorbar(steps, points, errors, fmt="o", capsize=4, label=name or None)
            continue
        (line,) = axes.plot(steps, points, marker="." if len(points) < 50 else "", label=name or None)
        low, high = ([p + sign * e for p, e in zip(points, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    if single:
        axes.set_xticks(range(len(curves)), list(curves))
    else:
        axes.set_xlabel("step")
        if len(curves) > 1:
            axes.legend(frameon=False)
    if bounds[0] is not None:
        axes.set_ylim(bottom=bounds[0])
    if bounds[1] is not None:
        axes.set_ylim(top=min(bounds[1], axes.get_ylim()[1]))
    axes.set_ylabel(label)
    return axes.figure, axes


def _by_name(values: Iterable[Any]) -> dict[str, list[Estimate]]:
    """Return the estimates by name, "" for those without one; NaN for an error that is not known."""
    curves: dict[str, list[Estimate]] = {}
    for value in values:
        for name, one in value.items() if isinstance(value, Mapping) else [("", value)]:
            estimate = one if isinstance(one, Estimate) else Estimate(one, one.new_full((), float("nan")))
            curves.setdefault(name, []).append(estimate)
    return curves


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


def layers(values: Mapping[str, Tensor] | Mapping[str, Estimate], axes: Any = None) -> tuple[Any, Any]:
    """Draw one bar a layer, the first layer on top, with an error bar of ± 2 standard errors for an estimate.

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
    curves = {layer: curve[0] for layer, curve in _by_name([values]).items()}
    _bars(
        axes,
        {layer: float(estimate.value) for layer, estimate in curves.items()},
        [2 * float(estimate.standard_error) for estimate in curves.values()],
    )
    return axes.figure, axes


def _bars(axes: Any, values: Mapping[str, float], errors: Sequence[float] | None = None) -> None:
    axes.barh([layer or "(model)" for layer in values], list(values.values()), xerr=errors)
    axes.invert_yaxis()
    axes.set(xlabel="alignment", ylabel="layer", xlim=(0, None))


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot as plt  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError("plot: expected the package matplotlib. Install it: pip install matplotlib.") from error
    return plt
