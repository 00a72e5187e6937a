"""Figures and tables of runs, made from their logs alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from training import messages, storage

Log = list[dict[str, float]]
COLORS = ("#1f6fb4", "#d1661f", "#2c8a57", "#8a4fa0", "#8c6d31", "#c0392b")


def pyplot() -> Any:
    """Return matplotlib.pyplot, set to draw into files; a run without a figure does not need it.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415
    except ImportError:
        raise messages.ToldError(
            "expected the package matplotlib, to draw with. Install it: pip install matplotlib"
        ) from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    return plt


def save(figure: Any, path: Path, dpi: int = 150) -> None:
    """Write a figure and close it.

    Raises:
        ValueError: if the file cannot be written.
    """
    with storage.writing(path):
        figure.savefig(path, dpi=dpi)
    pyplot().close(figure)


PANELS = {
    "accuracy": {"test/accuracy": "test", "train/accuracy": "train"},
    "alignment with the labels, ± 2 s.e.": {"test/alignment": "test", "train/alignment": "train"},
    "rank of the centered tangent kernel": {
        "train/effective_rank": "effective rank",
        "train/participation_ratio": "participation ratio",
    },
    "path complexity": {"train/path_complexity": "path complexity"},
}
"""The curves of each panel, by its title: the first is solid, the second dotted."""


def draw(runs: dict[str, Log], title: str, path: Path) -> None:
    """Draw accuracy and, if logged, alignment with its error, ranks, and path complexity, with one color per run."""
    plt = pyplot()
    have = set.intersection(*(set(log[0]) for log in runs.values()))
    panels = {heading: keys for heading, keys in PANELS.items() if have.issuperset(keys)}
    figure, axes = plt.subplots(1, len(panels), figsize=(3.5 * len(panels), 3.4), layout="constrained", squeeze=False)
    for axis, (heading, keys) in zip(axes[0], panels.items(), strict=True):
        for index, log in enumerate(runs.values()):
            for key, style in zip(keys, "-:", strict=False):
                _curve(axis, log, key, style, COLORS[index % len(COLORS)])
        if len(keys) > 1:
            for style, name in zip("-:", keys.values(), strict=True):
                axis.plot([], [], style, color="0.3", label=name)
        finish(axis, heading, legend=len(keys) > 1)
    figure.suptitle(title, fontsize=11)
    if len(runs) > 1:
        handles = [plt.Line2D([], [], color=COLORS[index % len(COLORS)]) for index in range(len(runs))]
        figure.legend(handles, list(runs), loc="outside lower center", ncols=len(runs), frameon=False, fontsize=9)
    save(figure, path)


def _curve(axis: Any, log: Log, key: str, style: str, color: str) -> None:
    steps, values = ([line[name] for line in log] for name in ("step", key))
    steps, error = [step + 1 for step in steps], f"{key}_std_error"
    if error in log[0]:
        shade(axis, steps, values, [2 * line[error] for line in log], style, color=color)
    else:
        axis.plot(steps, values, style, color=color)


def task(config: dict[str, Any]) -> str:
    """Return a description of the task of a run."""
    mixed = f" and {config['mix_size']} {config['mix']}" if config["mix"] else ""
    return f"{config['dataset']}{mixed}, {config['model']}, label noise {config['label_noise']:g}"


def label(config: dict[str, Any]) -> str:
    """Return a name for a run, made from its regularizers."""
    parts = [f"weight decay {config['weight_decay']:g}"] if config["weight_decay"] else []
    if config["regularizer"] != "none":
        parts.append(f"{config['regularizer']} {config['weight']:g}")
    return " + ".join(parts) or "none"


COLUMNS = {
    "step": ("step", "{:d}"),
    "train/loss": ("train\nloss", "{:.3f}"),
    "train/accuracy": ("train\naccuracy", "{:.3f}"),
    "test/accuracy": ("test\naccuracy", "{:.3f}"),
    "train/alignment": ("alignment\non train ± s.e.", "{:.3f}"),
    "test/alignment": ("alignment\non test ± s.e.", "{:.3f}"),
    "train/effective_rank": ("effective\nrank", "{:.1f}"),
    "train/participation_ratio": ("participation\nratio", "{:.1f}"),
    "train/path_complexity": ("path\ncomplexity", "{:.0f}"),
}


def print_table(log: Log, rows: int = 8) -> None:
    """Print some rows of a log, including the first and the last."""
    chosen = sorted({round(i * (len(log) - 1) / max(1, rows - 1)) for i in range(rows)})
    shown = {key: column for key, column in COLUMNS.items() if key in log[0]}
    lines = []
    for line in (log[i] for i in chosen):
        errors = (f" ± {line[f'{key}_std_error']:.3f}" if f"{key}_std_error" in line else "" for key in shown)
        values = (form.format(line[key]) for key, (_, form) in shown.items())
        lines.append([value + error for value, error in zip(values, errors, strict=True)])
    print_lines([heading for heading, _ in shown.values()], lines, width=118)


def print_lines(headings: Sequence[str], lines: Iterable[Sequence[str]], *, width: int, left: str = "") -> None:
    """Print a table of at least this width, with the column ``left`` aligned left and the others right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == left else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    Console(width=max(width, Console().width)).print(table)


def shade(axis: Any, x: list[float], middle: list[float], spread: list[float], style: str = "-", **line: Any) -> None:
    """Draw a line with a band of half width ``spread`` around it."""
    axis.plot(x, middle, style, **line)
    low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=line["color"], alpha=0.15, linewidth=0)


STEPS = "optimizer steps + 1"


def finish(axis: Any, title: str, *, x: str = STEPS, bottom: float | None = 0, legend: bool = True) -> None:
    """Set scale, limits, labels and frame of a panel; the x axis is logarithmic for optimizer steps."""
    if x == STEPS:
        axis.set_xscale("log")
    if bottom is not None:
        axis.set_ylim(bottom=bottom)
    axis.set_xlabel(x)
    axis.set_title(title, fontsize=10)
    if legend:
        axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
