"""One figure of a run, from its log alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

TRAIN, TEST = "#1f6fb4", "#d1661f"


def draw(log: list[dict[str, float]], title: str, path: Path) -> None:
    """Draw accuracy, alignment with its error, and the two ranks along training."""
    steps = [line["step"] + 1 for line in log]

    def series(key: str) -> list[float]:
        return [line[key] for line in log]

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for part, color in (("train", TRAIN), ("test", TEST)):
        left.plot(steps, series(f"{part}/accuracy"), color=color, label=f"{part} accuracy")
        value, error = series(f"{part}/alignment"), series(f"{part}/alignment_std_error")
        middle.plot(steps, value, color=color, label=f"{part} examples")
        low = [v - 2 * e for v, e in zip(value, error, strict=True)]
        high = [v + 2 * e for v, e in zip(value, error, strict=True)]
        middle.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    loss = left.twinx()
    loss.plot(steps, series("train/loss"), color="0.5", linestyle=":", label="train loss")
    loss.set_ylabel("loss", color="0.4")
    left.plot([], [], color="0.5", linestyle=":", label="train loss")
    left.set_ylim(0, 1.02)
    right.plot(steps, series("train/effective_rank"), color="#2c8a57", label="effective rank")
    right.plot(steps, series("train/participation_ratio"), color="#8a4fa0", label="participation ratio")
    _finish(left, "accuracy", "center right")
    _finish(middle, "alignment with the labels (± 2 s.e.)")
    _finish(right, "rank of the centred tangent kernel")
    middle.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _finish(axis: Any, title: str, legend: str = "best") -> None:
    axis.set_xscale("log")
    axis.set_xlabel("optimizer steps + 1")
    axis.set_title(title, fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc=legend)
    axis.spines["top"].set_visible(False)
