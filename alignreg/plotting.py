"""Figures of values, spectra, layers, paths, and functions on the plane.

Each function draws tensors or results of ``compute()`` on the matplotlib axes ``ax`` (new ones by default), and returns
the figure and the axes. matplotlib is imported only when something is drawn; without it the functions raise
``ImportError``. An argument of another type than described is a ``TypeError``; one with another shape, length or number
of axes is a ``ValueError``. ``steps`` are the training steps of the values; by default values are numbered.
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
    """The interface of a path through the space of weights, such as :class:`~alignreg.metrics.PathHistory`."""

    @property
    def lengths(self) -> Tensor:
        """‖δw_t‖ of the interval that begins at record t, ``(T + 1,)``; the last one is still open."""

    @property
    def traces(self) -> Tensor:
        """The trace of K at record t, ``(T + 1,)``."""


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
        ax: matplotlib axes.
        label: the name of the values.
        bounds: the range of the values, as far as it is known.
        steps: the training step of each value of a curve.
    """
    single = isinstance(values, (Estimate, Mapping, Real)) or (isinstance(values, Tensor) and values.ndim == 0)
    records = [values] if single else checks.each(values)
    curves = _by_name(records)
    label, (low, high) = checks.text("label", label), _bounds(bounds)
    figure, ax = _single(ax, (5, 3.2))
    if any(math.isfinite(error) and error > 0 for curve in curves.values() for _, error in curve):
        label += ", ± 2 s.e."
    at, axis_label = _steps(steps, len(records))
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
    """Draw eigenvalues, the share of the trace in the largest ones, and bars for layers if given.

    Args:
        eigenvalues: descending, ``(n·c,)``, as :func:`~alignreg.functional.spectrum` returns them.
        layers: the alignment of each layer.
        ax: a sequence of two matplotlib axes, or of three with ``layers``.
    """
    eigenvalues = checks.values("eigenvalues", eigenvalues, integers=False).detach().cpu()
    if eigenvalues.ndim != 1 or not len(eigenvalues):
        raise ValueError(f"eigenvalues: expected (n·c,), got shape {tuple(eigenvalues.shape)}.")
    if layers is not None:
        _by_layer("layers", [layers])
    plots = 3 if layers else 2
    figure, axes = _several(ax, plots, (4 * plots, 3.2))
    index = range(1, len(eigenvalues) + 1)
    # Centering leaves c eigenvalues that are zero up to rounding errors.
    above = eigenvalues[eigenvalues > 1e-8 * eigenvalues[0]]
    axes[0].loglog(index[: len(above)], above)
    axes[0].set(xlabel="index j", ylabel="eigenvalue λ_j")
    axes[1].semilogx(index, eigenvalues.cumsum(0) / eigenvalues.sum())
    axes[1].set(xlabel="k", ylabel="share of the trace in the k largest", ylim=(0, 1.02))
    if layers:
        bars(layers, axes[2])
    return figure, axes


def bars(values: Mapping[str, Number], ax: Any = None, *, label: str = "alignment") -> tuple[Any, Any]:
    """Draw one bar for each layer, the first layer on top, with an error bar of ± 2 standard errors for an estimate.

    Args:
        values: a number for each layer, such as a result of :class:`~alignreg.metrics.LayerwiseAlignment`.
        ax: matplotlib axes.
        label: the name of the values.
    """
    by_layer = {layer: curve[0] for layer, curve in _by_layer("values", [values]).items()}
    label = checks.text("label", label)
    figure, ax = _single(ax, (5, 1 + 0.25 * len(by_layer)))
    lengths = [float(estimate.value) for estimate in by_layer.values()]
    errors = [2 * float(estimate.standard_error) for estimate in by_layer.values()]
    ax.barh(_layers(by_layer), lengths, xerr=errors)
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
    """Draw a number of each layer along training: a row for each layer, the first on top, a column for each record.

    All columns have the same width, whatever the steps between them. NaN is gray.

    Args:
        values: results of :class:`~alignreg.metrics.LayerwiseAlignment`, one for each record, with the same layers.
        ax: matplotlib axes.
        label: the name of the values.
        steps: the training step of each record.
    """
    records = checks.each(values) if not isinstance(values, Mapping) else (values,)
    by_layer = _by_layer("values", records)
    if not records or any(list(one) != list(records[0]) for one in records):
        raise ValueError("values: expected the same layers in one or more records. Pass results of one metric.")
    label = checks.text("label", label)
    at, axis_label = _steps(steps, len(records))
    table = [[float(value) for value, _ in curve] for curve in by_layer.values()]
    figure, ax = _single(ax, (5.5, 1.2 + 0.25 * len(table)))
    colors = _pyplot().get_cmap("viridis").with_extremes(bad="0.8")
    image = ax.imshow(table, aspect="auto", interpolation="nearest", cmap=colors, vmin=0)
    shown = range(0, len(at), -(-len(at) // 8))
    ax.set_xticks(shown, [f"{at[index]:g}" for index in shown])
    ax.set_yticks(range(len(table)), _layers(by_layer))
    ax.set(xlabel=axis_label, ylabel="layer")
    figure.colorbar(image, ax=ax, label=label)
    return figure, ax


def path(history: Path, ax: Any = None, *, steps: Sequence[float] | None = None) -> tuple[Any, list[Any]]:
    """Draw how C = Σ_t ‖δw_t‖‖Φ_t‖_F grows, and the factors of each term at the start of its interval.

    Args:
        history: a result of :meth:`PathComplexity.history() <alignreg.metrics.PathComplexity.history>`, or another
            object with ``lengths`` and ``traces`` ``(T + 1,)``.
        ax: a sequence of two matplotlib axes.
        steps: the training step of each record.
    """
    if not (hasattr(history, "lengths") and hasattr(history, "traces")):
        raise TypeError(f"history: expected a PathHistory, got {type(history).__name__}. Pass metric.history().")
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
    # The last interval is still open.
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
    """Draw functions of two variables side by side, such as eigenfunctions of a kernel, each with its own color scale.

    An eigenvector u of the kernel K of n points, with eigenvalue λ, extends to other points by
    u(x) = Σ_i k(x, x_i) u_i / λ: ``features.kernel(torch.cartesian_prod(x, y), points).flatten(1) @ u / λ`` for one
    output.

    Args:
        functions: values at the points of ``torch.cartesian_prod(x, y)``, ``(len(x) · len(y), k)``.
        x: the coordinates of the columns of the grid.
        y: the coordinates of its rows.
        ax: a sequence of k matplotlib axes.
        names: the names of the functions; "eigenfunction 1", ... by default.
        boundary: another function ``(len(x) · len(y),)``, whose zeros are drawn as a line.
        signed: whether values have a sign, as those of eigenfunctions do; zero is then white. Otherwise, as for norms,
            the color scale begins at zero.

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
        scale = {"cmap": "RdBu", "vmin": -bound} if signed else {"cmap": "magma", "vmin": 0}
        axis.pcolormesh(*at, values, shading="nearest", rasterized=True, vmax=bound, **scale)
        if zeros is not None:
            axis.contour(*at, zeros, [0], colors="k", linewidths=0.6)
        axis.set(aspect="equal", xlabel="x")
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("y")
    return figure, axes


def _by_name(values: Iterable[Any]) -> dict[str, list[Estimate]]:
    """Return the estimates by name ("" for values without one), with NaN for an unknown error."""
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
    """Return a number, which may be NaN or infinite, as a tensor."""
    if isinstance(value, Real):
        value = torch.tensor(float(value), dtype=torch.float64)
    number = checks.real("values", value, integers=True)
    if number.numel() != 1:
        raise ValueError(f"values: expected numbers, or estimates of them, got a tensor {tuple(number.shape)}.")
    return number.reshape(())


def _coordinates(name: str, value: Any) -> Tensor:
    coordinates = checks.values(name, value)
    if coordinates.ndim != 1 or len(coordinates) < 2:
        raise ValueError(f"{name}: expected k ≥ 2 coordinates (k,) of a grid, got shape {tuple(coordinates.shape)}.")
    return coordinates


def _bounds(bounds: Any) -> tuple[float | None, float | None]:
    pair = checks.each(bounds)
    if len(pair) != 2:
        raise ValueError(f"bounds: expected a pair of numbers or None, got {checks.shown(bounds)}.")
    low, high = (None if bound is None else checks.number("bounds", bound) for bound in pair)
    return low, high


def _layers(values: Iterable[str]) -> list[str]:
    return [layer or "(model)" for layer in values]


def _steps(steps: Sequence[float] | None, count: int) -> tuple[list[float], str]:
    """Return the positions of the records on the axis, and the label of the axis."""
    if steps is None:
        return list(range(count)), "record"
    at = [checks.number("steps", step.item() if isinstance(step, Tensor) else step) for step in checks.each(steps)]
    if len(at) != count:
        raise ValueError(f"steps: expected {count}, one for each record, got {len(at)}.")
    return at, "step"


def _single(ax: Any, size: tuple[float, float]) -> tuple[Any, Any]:
    """Return the figure and the axes, new ones of this size by default."""
    figure, (axes,) = _several(ax, 1, size)
    return figure, axes


def _several(ax: Any, count: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """Return the figure and a row of axes, new ones of this size by default."""
    if ax is None:
        figure, axes = _pyplot().subplots(1, count, figsize=size, layout="constrained", squeeze=False)
        return figure, list(axes[0])
    axes = list(checks.each(ax))
    odd = [type(axis).__name__ for axis in axes if not hasattr(axis, "figure")]
    if odd:
        raise TypeError(f"ax: expected matplotlib axes, got {odd[0]}. Pass those of plt.subplots().")
    if len(axes) != count:
        raise ValueError(f"ax: expected {count} axes, got {len(axes)}. Pass those of plt.subplots(1, {count}).")
    return axes[0].figure, axes


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot as plt  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError("plot: expected the package matplotlib. Install it: pip install matplotlib.") from error
    return plt
