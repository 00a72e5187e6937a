"""One figure and one table of runs, from their logs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _run
import matplotlib as mpl
from rich import box
from rich.console import Console
from rich.table import Table

mpl.use("Agg")
import matplotlib.pyplot as plt

Log = list[dict[str, float]]
COLORS = ("#1f6fb4", "#d1661f", "#2c8a57", "#8a4fa0", "#8c6d31", "#c0392b")


def draw(runs: dict[str, Log], title: str, path: Path) -> None:
    """Draw accuracy, alignment with its error, the two ranks, and path complexity along training; a colour a run."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    accuracy, alignment, rank, complexity = axes
    for index, (label, log) in enumerate(runs.items()):
        color = COLORS[index % len(COLORS)]
        steps = [line["step"] + 1 for line in log]
        for part, style in (("test", "-"), ("train", ":")):
            accuracy.plot(steps, _series(log, f"{part}/accuracy"), style, color=color)
            value, error = _series(log, f"{part}/alignment"), _series(log, f"{part}/alignment_std_error")
            alignment.plot(steps, value, style, color=color)
            low = [v - 2 * e for v, e in zip(value, error, strict=True)]
            high = [v + 2 * e for v, e in zip(value, error, strict=True)]
            alignment.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        rank.plot(steps, _series(log, "train/effective_rank"), "-", color=color)
        rank.plot(steps, _series(log, "train/participation_ratio"), ":", color=color)
        complexity.plot(steps, _series(log, "train/path_complexity"), "-", color=color, label=label)
    _finish(accuracy, "accuracy", "test", "train")
    _finish(alignment, "alignment with the labels, ± 2 s.e.", "test", "train")
    _finish(rank, "rank of the centred tangent kernel", "effective rank", "participation ratio")
    _finish(complexity, "path complexity")
    figure.suptitle(title, fontsize=11)
    handles, labels = complexity.get_legend_handles_labels()
    if len(runs) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(runs), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def task(config: dict[str, Any]) -> str:
    """Say what a run was trained on."""
    mixed = f" and {config['mix_size']} {config['mix']}" if config["mix"] else ""
    return f"{config['dataset']}{mixed}, {config['model']}, label noise {config['label_noise']:g}"


def label(config: dict[str, Any]) -> str:
    """Name a run by what regularised it."""
    parts = [f"weight decay {config['weight_decay']:g}"] if config["weight_decay"] else []
    if config["regularizer"] != "none":
        parts.append(f"{config['regularizer']} {config['weight']:g}")
    return " + ".join(parts) or "none"


def print_table(folder: Path, rows: int = 8) -> None:
    """Print some rows of the log, the first and last among them."""
    log = _run.read(folder)
    chosen = sorted({round(i * (len(log) - 1) / max(1, rows - 1)) for i in range(rows)})
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ("step", "train\nloss", "train\naccuracy", "test\naccuracy", "alignment\non train ± s.e.")
    columns += ("alignment\non test ± s.e.", "effective\nrank", "participation\nratio", "path\ncomplexity")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for line in (log[i] for i in chosen):
        table.add_row(
            str(line["step"]),
            f"{line['train/loss']:.3f}",
            f"{line['train/accuracy']:.3f}",
            f"{line['test/accuracy']:.3f}",
            f"{line['train/alignment']:.3f} ± {line['train/alignment_std_error']:.3f}",
            f"{line['test/alignment']:.3f} ± {line['test/alignment_std_error']:.3f}",
            f"{line['train/effective_rank']:.1f}",
            f"{line['train/participation_ratio']:.1f}",
            f"{line['train/path_complexity']:.0f}",
        )
    Console(width=max(118, Console().width)).print(table)


def _series(log: Log, key: str) -> list[float]:
    return [line[key] for line in log]


def _finish(axis: Any, title: str, *styles: str) -> None:
    for style, name in zip("-:", styles, strict=False):
        axis.plot([], [], style, color="0.3", label=name)
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("optimizer steps + 1")
    axis.set_title(title, fontsize=10)
    if styles:
        axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
