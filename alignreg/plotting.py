"""Figures of values, spectra, layers, paths and functions of the plane.

Each function takes tensors or results of ``compute()`` and, as ``ax``, the matplotlib axes to draw on (new ones by
default), and returns the figure and the axes. matplotlib is imported only when something is drawn. What is of another
kind than described is a ``TypeError``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from alignreg import checks
from alignreg.estimators import Estimate

Number = Tensor | Estimate | float
Value = Number | Mapping[str, Number]


class Path(Protocol):
    """A path through the space of weights, as :class:`~alignreg.metrics.PathHistory`."""

    @property
    def lengths(self) -> Tensor:
        """‖δw_t‖ of the interval that begins at moment t, ``(T + 1,)``; the last one is still open."""

    @property
    def traces(self) -> Tensor:
        """The trace of K at moment t, ``(T + 1,)``."""


def estimates(
    values: Value | Sequence[Value],
    ax: Any = None,
    *,
    label: str = "value",
    bounds: tuple[float | None, float | None] = (None, None),
    steps: Sequence[float] | None = None,
) -> tuple[Any, Any]:
    """Draw values: points with error bars, or curves with bands, of ± 2 standard errors where these are known.

    Args:
        values: a scalar, an estimate, or a dict of them; or a sequence of these, drawn as curves.
        ax: matplotlib axes; new ones by default.
        label: what the values are.
        bounds: between which they lie, as far as that is known.
        steps: of training, one for each value of a curve; without them values are numbered.

    Returns:
        Figure and axes.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if there are not as many steps as values.
    """
    single = isinstance(values, (Estimate, Mapping, Real)) or (isinstance(values, Tensor) and values.ndim == 0)
    moments = [values] if single else checks.each(values)
    curves = _by_name(moments)
    label, (low, high) = checks.text("label", label), _bounds(bounds)
    figure, ax = _single(ax, (5, 3.2))
    if any(math.isfinite(error) and error > 0 for curve in curves.values() for _, error in curve):
        label += ", ± 2 s.e."
    at, axis_label = _steps(steps, len(moments))
    for index, (name, curve) in enumerate(curves.items()):
        points = [float(value) for value, _ in curve]
        errors = [2 * float(error) for _, error in curve]
        if single:
            ax.errorbar([index], points, errors, fmt="o", capsize=4, label=name or None)
            continue
        (line,) = ax.plot(at, points, marker="." if len(points) < 50 else "", label=name or None)
        below, above = ([p + sign * e for p, e in zip(points, errors, strict=True)] for sign in (-1, 1))
        ax.fill_between(at, below, above, color=line.get_color(), alpha=0.2, linewidth=0)
    if single:
        names = [name for name in curves if name]
        ax.set_xticks(range(len(names)), names)
        ax.set_xlim(-0.5, len(curves) - 0.5)
    else:
        ax.set_xlabel(axis_label)
        if len(curves) > 1:
            ax.legend(frameon=False)
    if low is not None:
        ax.set_ylim(bottom=low)
    if high is not None:
        ax.set_ylim(top=min(high, ax.get_ylim()[1]))
    ax.set_ylabel(label)
    return figure, ax


def spectrum(eigenvalues: Tensor, layers: Mapping[str, Number] | None = None, ax: Any = None) -> tuple[Any, list[Any]]:
    """Draw eigenvalues and the share of the trace that the largest hold, and bars for layers if there are any.

    Args:
        eigenvalues: descending, ``(n·c,)``, as of :func:`~alignreg.functional.spectrum`.
        layers: the alignment of each layer.
        ax: two or three matplotlib axes; new ones by default.

    Returns:
        Figure and the list of axes.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the number of axes does not fit.
    """
    eigenvalues = checks.values("eigenvalues", eigenvalues, integers=False).detach().cpu()
    if eigenvalues.ndim != 1 or not len(eigenvalues):
        raise ValueError(f"eigenvalues: expected (n·c,), got shape {tuple(eigenvalues.shape)}.")
    if layers is not None:
        _by_layer("layers", [layers])
    plots = 3 if layers else 2
    figure, axes = _several(ax, plots, (4 * plots, 3.2))
    index = range(1, len(eigenvalues) + 1)
    # Centering leaves c eigenvalues that are zero up to rounding.
    above = eigenvalues[eigenvalues > 1e-8 * eigenvalues[0]]
    axes[0].loglog(index[: len(above)], above)
    axes[0].set(xlabel="index j", ylabel="eigenvalue λ_j")
    axes[1].semilogx(index, eigenvalues.cumsum(0) / eigenvalues.sum())
    axes[1].set(xlabel="k", ylabel="share of the trace in the k largest", ylim=(0, 1.02))
    if layers:
        bars(layers, axes[2])
    return figure, axes


def bars(values: Mapping[str, Number], ax: Any = None, *, label: str = "alignment") -> tuple[Any, Any]:
    """Draw one bar a layer, the first layer on top, with an error bar of ± 2 standard errors for an estimate.

    Args:
        values: a number for each layer, such as a result of :class:`~alignreg.metrics.LayerwiseAlignment`.
        ax: matplotlib axes; new ones by default.
        label: what the values are.

    Returns:
        Figure and axes.

    Raises:
        ImportError: if matplotlib is missing.
    """
    found = {layer: curve[0] for layer, curve in _by_layer("values", [values]).items()}
    label = checks.text("label", label)
    figure, ax = _single(ax, (5, 1 + 0.25 * len(found)))
    lengths = [float(estimate.value) for estimate in found.values()]
    errors = [2 * float(estimate.standard_error) for estimate in found.values()]
    ax.barh(_layers(found), lengths, xerr=errors)
    ax.invert_yaxis()
    ax.set(xlabel=label, ylabel="layer", xlim=(0, None))
    return figure, ax


def heat_map(
    values: Sequence[Mapping[str, Number]],
    ax: Any = None,
    *,
    label: str = "alignment",
    steps: Sequence[float] | None = None,
) -> tuple[Any, Any]:
    """Draw a number of each layer along training: a row for each layer, the first on top, a column for each moment.

    Columns are equally wide, whatever lies between their steps. NaN is gray.

    Args:
        values: results of :class:`~alignreg.metrics.LayerwiseAlignment`, one for each moment.
        ax: matplotlib axes; new ones by default.
        label: what the values are.
        steps: of training, one for each moment; without them moments are numbered.

    Returns:
        Figure and axes.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if there are no values, if moments have different layers, or not as many steps as moments.
    """
    moments = checks.each(values) if not isinstance(values, Mapping) else (values,)
    found = _by_layer("values", moments)
    if not moments or any(list(one) != list(moments[0]) for one in moments):
        raise ValueError("values: expected the same layers at each of one or more moments. Take one metric's results.")
    label = checks.text("label", label)
    at, axis_label = _steps(steps, len(moments))
    table = [[float(value) for value, _ in curve] for curve in found.values()]
    figure, ax = _single(ax, (5.5, 1.2 + 0.25 * len(table)))
    colors = _pyplot().get_cmap("viridis").with_extremes(bad="0.8")
    image = ax.imshow(table, aspect="auto", interpolation="nearest", cmap=colors, vmin=0)
    shown = range(0, len(at), -(-len(at) // 8))
    ax.set_xticks(shown, [f"{at[index]:g}" for index in shown])
    ax.set_yticks(range(len(table)), _layers(found))
    ax.set(xlabel=axis_label, ylabel="layer")
    figure.colorbar(image, ax=ax, label=label)
    return figure, ax


def path(history: Path, ax: Any = None, *, steps: Sequence[float] | None = None) -> tuple[Any, list[Any]]:
    """Draw how far training has gone, C = Σ_t ‖δw_t‖‖Φ_t‖_F, and the factors of each term where its interval begins.

    Args:
        history: of :meth:`PathComplexity.history() <alignreg.metrics.PathComplexity.history>`, or lengths and traces
            ``(T + 1,)`` in a :class:`~alignreg.metrics.PathHistory`.
        ax: two matplotlib axes; new ones by default.
        steps: of training, one for each moment; without them moments are numbered.

    Returns:
        Figure and the list of two axes.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the number of axes or of steps does not fit.
    """
    if not (hasattr(history, "lengths") and hasattr(history, "traces")):
        raise TypeError(f"history: expected a PathHistory, got {type(history).__name__}. Take metric.history().")
    lengths, traces = (
        checks.values(name, values).detach().cpu()
        for name, values in (("history.lengths", history.lengths), ("history.traces", history.traces))
    )
    if lengths.ndim != 1 or lengths.shape != traces.shape or not len(lengths):
        raise ValueError(
            "history: expected lengths and traces (T + 1,), got shapes "
            f"{tuple(lengths.shape)} and {tuple(traces.shape)}."
        )
    features = traces.sqrt()
    at, axis_label = _steps(steps, len(lengths))
    figure, axes = _several(ax, 2, (8, 3.2))
    marker = "." if len(lengths) < 50 else ""
    # What was gone since the last moment has no end yet.
    terms = (lengths * features)[:-1]
    axes[0].plot(at, torch.cat([terms.new_zeros(1), terms.cumsum(0)]), marker=marker)
    axes[0].set(xlabel=axis_label, ylabel="path complexity Σ ‖δw‖‖Φ‖_F", ylim=(0, None))
    axes[1].plot(at[:-1], lengths[:-1], marker=marker, label="‖δw‖")
    axes[1].plot(at, features, marker=marker, label="‖Φ‖_F")
    axes[1].set(xlabel=axis_label, ylabel="factors of the terms", yscale="log")
    axes[1].legend(frameon=False)
    return figure, axes


def plane(
    functions: Tensor,
    x: Tensor,
    y: Tensor,
    ax: Any = None,
    *,
    names: Sequence[str] | None = None,
    boundary: Tensor | None = None,
    signed: bool = True,
) -> tuple[Any, list[Any]]:
    """Draw functions of two variables side by side, such as eigenfunctions of a kernel, each in a scale of its own.

    An eigenvector u of the kernel K of n points, with eigenvalue λ, is continued to other points by
    u(x) = Σ_i k(x, x_i) u_i / λ: ``features.kernel(torch.cartesian_prod(x, y), points).flatten(1) @ u / λ`` for one
    output.

    Args:
        functions: values at the points of ``torch.cartesian_prod(x, y)``, ``(len(x) · len(y), k)``.
        x: where the columns of the grid lie.
        y: where its rows lie.
        ax: k matplotlib axes; new ones by default.
        names: of the functions; "eigenfunction 1", ... by default.
        boundary: another function ``(len(x) · len(y),)``, whose zeros are drawn as a line.
        signed: whether values have a sign, as those of eigenfunctions: white is then zero. Norms are drawn from zero.

    Returns:
        Figure and the list of k axes.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if sizes do not fit.

    Example:
        >>> import torch
        >>> from alignreg import plotting
        >>> x, y = torch.linspace(-1, 1, 20), torch.linspace(0, 1, 10)
        >>> grid = torch.cartesian_prod(x, y)
        >>> figure, axes = plotting.plane(grid, x, y, names=["x", "y"])  # doctest: +SKIP
    """
    x, y = _coordinates("x", x), _coordinates("y", y)
    functions = checks.values("functions", functions)
    boundary = None if boundary is None else checks.values("boundary", boundary)
    signed = checks.flag("signed", signed)
    size = len(x) * len(y)
    if functions.ndim != 2 or len(functions) != size or (boundary is not None and boundary.shape != (size,)):
        raise ValueError(
            f"functions: expected ({size}, k) values at the points of torch.cartesian_prod(x, y), and boundary "
            f"({size},), got {tuple(functions.shape)}{'' if boundary is None else f' and {tuple(boundary.shape)}'}."
        )
    count = functions.shape[1]
    names = [f"eigenfunction {j + 1}" for j in range(count)] if names is None else list(checks.each(names))
    names = [checks.text("names", name) for name in names]
    if len(names) != count:
        raise ValueError(f"names: expected {count}, one for each function, got {len(names)}.")
    height = 2.2 * float((y.max() - y.min()) / (x.max() - x.min()))
    figure, axes = _several(ax, count, (2.2 * count, height + 0.6))
    at = [coordinates.detach().cpu().numpy() for coordinates in (x, y)]
    maps = [values.detach().cpu().reshape(len(x), len(y)).T.numpy() for values in functions.T]
    zeros = None if boundary is None else boundary.detach().cpu().reshape(len(x), len(y)).T.numpy()
    for axis, name, values in zip(axes, names, maps, strict=True):
        bound = float(abs(values).max())
        axis.pcolormesh(
            *at,
            values,
            shading="nearest",
            rasterized=True,
            cmap="RdBu" if signed else "magma",
            vmin=-bound if signed else 0,
            vmax=bound,
        )
        if zeros is not None:
            axis.contour(*at, zeros, [0], colors="k", linewidths=0.6)
        axis.set(aspect="equal", xlabel="x")
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("y")
    return figure, axes


def _by_name(values: Iterable[Any]) -> dict[str, list[Estimate]]:
    """Return the estimates by name, "" for those without one; NaN for an error that is not known."""
    unknown = torch.tensor(float("nan"))
    curves: dict[str, list[Estimate]] = {}
    for value in values:
        for name, one in value.items() if isinstance(value, Mapping) else [("", value)]:
            estimate = one if isinstance(one, Estimate) else Estimate(one, unknown)
            curves.setdefault(name, []).append(Estimate(*map(_scalar, estimate)))
    return curves


def _by_layer(name: str, values: Iterable[Any]) -> dict[str, list[Estimate]]:
    """Return the estimates of each layer."""
    for one in values:
        if not isinstance(one, Mapping):
            raise TypeError(f"{name}: expected a number for each layer, as a dict, got {checks.shown(one)}.")
    return _by_name(values)


def _scalar(value: Any) -> Tensor:
    """Return a number as a tensor; it may be NaN or infinite."""
    if isinstance(value, Real):
        value = torch.tensor(float(value), dtype=torch.float64)
    number = checks.real("values", value, integers=True)
    if number.numel() != 1:
        raise ValueError(f"values: expected numbers, or estimates of them, got a tensor {tuple(number.shape)}.")
    return number.reshape(())


def _coordinates(name: str, value: Any) -> Tensor:
    found = checks.values(name, value)
    if found.ndim != 1 or len(found) < 2:
        raise ValueError(f"{name}: expected the coordinates (k,) of a grid, at least 2, got {tuple(found.shape)}.")
    return found


def _bounds(bounds: Any) -> tuple[float | None, float | None]:
    found = checks.each(bounds)
    if len(found) != 2:
        raise ValueError(f"bounds: expected a pair of numbers or None, got {checks.shown(bounds)}.")
    low, high = (None if bound is None else checks.number("bounds", bound) for bound in found)
    return low, high


def _layers(values: Iterable[str]) -> list[str]:
    return [layer or "(model)" for layer in values]


def _steps(steps: Sequence[float] | None, count: int) -> tuple[list[float], str]:
    """Return where moments lie, and what that is called."""
    if steps is None:
        return list(range(count)), "moment"
    found = [checks.number("steps", step.item() if isinstance(step, Tensor) else step) for step in checks.each(steps)]
    if len(found) != count:
        raise ValueError(f"steps: expected {count}, one for each moment, got {len(found)}.")
    return found, "step"


def _single(ax: Any, size: tuple[float, float]) -> tuple[Any, Any]:
    """Return figure and axes, new ones of this size if there are none."""
    figure, (axes,) = _several(ax, 1, size)
    return figure, axes


def _several(ax: Any, count: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """Return figure and axes in a row, new ones of this size if there are none."""
    if ax is None:
        figure, axes = _pyplot().subplots(1, count, figsize=size, layout="constrained", squeeze=False)
        return figure, list(axes[0])
    axes = list(checks.each(ax))
    odd = [type(axis).__name__ for axis in axes if not hasattr(axis, "figure")]
    if odd:
        raise TypeError(f"ax: expected matplotlib axes, got {odd[0]}. Take those of plt.subplots().")
    if len(axes) != count:
        raise ValueError(f"ax: expected {count} axes, as of plt.subplots(1, {count}), got {len(axes)}.")
    return axes[0].figure, axes


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot as plt  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError("plot: expected the package matplotlib. Install it: pip install matplotlib.") from error
    return plt
