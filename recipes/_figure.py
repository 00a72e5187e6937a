"""One figure of one or several runs, from their logs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

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
