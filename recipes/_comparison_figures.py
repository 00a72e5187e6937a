"""Figures of a comparison: differences, paths, and explicit beside implicit alignment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _comparison
import _figure
import _study
import matplotlib.pyplot as plt
from _comparison import DECAY, NONE, REACHED

PANELS = {
    "test accuracy": "test/accuracy",
    "held-out alignment": REACHED["alignment"],
    "effective rank": REACHED["effective_rank"],
    "path complexity": REACHED["path_complexity"],
}


def draw(folder: Path, found: dict[str, Any]) -> list[Path]:
    """Draw all figures into the comparison's folder."""
    figures = {"differences": _differences, "paths": _paths, "explicit": _explicit}
    drawn = []
    for name, make in figures.items():
        figure = make(folder, found)
        drawn.append(folder / f"{name}.png")
        figure.savefig(drawn[-1], dpi=130)
        plt.close(figure)
    return drawn


def _differences(folder: Path, found: dict[str, Any]) -> Any:  # noqa: ARG001
    settings = found["settings"]
    columns = min(4, len(settings))
    lines = -(-len(settings) // columns)
    rows = len(settings[0]["rows"])
    size = (2 + 2.6 * columns, lines * (0.9 + 0.24 * rows))
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axis, setting in zip(axes.flat, settings, strict=False):
        for place, row in enumerate(reversed(setting["rows"])):
            difference = _comparison.against(setting, row, DECAY)
            if difference is None:
                continue
            color = {1: _figure.COLORS[2], -1: _figure.COLORS[5]}.get(difference.settled, "0.45")
            axis.plot([difference.low, difference.high], [place, place], color=color, linewidth=1.6)
            axis.plot([difference.mean], [place], "o", color=color, markersize=4)
        axis.axvline(0, color="0.7", linewidth=0.8)
        axis.set_yticks(range(rows), [_comparison.name_of(row) for row in reversed(setting["rows"])], fontsize=8)
        axis.set_title(setting["setting"], fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        if setting["setting"].startswith("few"):
            axis.set_xlim(left=max(axis.get_xlim()[0], -0.08))
    for axis in list(axes.flat)[len(settings) :]:
        axis.set_visible(False)
    figure.suptitle("test accuracy minus that of tuned weight decay, corrected 95 % intervals", fontsize=11)
    return figure


def _paths(folder: Path, found: dict[str, Any]) -> Any:
    settings = found["settings"]
    shape = (len(settings), len(PANELS))
    size = (3.4 * shape[1], 2.5 * shape[0] + 0.6)
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    names = [row["method"] for row in settings[0]["rows"] if not row["on_top"]]
    for line, setting in zip(axes, settings, strict=True):
        for axis, (title, key) in zip(line, PANELS.items(), strict=True):
            for name in names:
                _study.band(axis, _logs(folder, setting, name, found["seeds"]), key, **_style(names, name))
            _figure.finish(axis, f"{setting['setting']}: {title}", legend=False)
            if key == PANELS["path complexity"]:
                axis.set_yscale("symlog", linthresh=100)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(8, len(names)), frameon=False, fontsize=9)
    return figure


def _explicit(folder: Path, found: dict[str, Any]) -> Any:
    """Effective rank and path complexity over held-out alignment: where explicit and implicit alignment go."""
    settings = found["settings"]
    others = ("effective rank", "path complexity")
    size = (2.9 * len(settings), 5.4)
    figure, axes = plt.subplots(len(others), len(settings), figsize=size, layout="constrained", squeeze=False)
    names = [row["method"] for row in settings[0]["rows"] if not row["on_top"]]
    for column, setting in zip(axes.T, settings, strict=True):
        for axis, other in zip(column, others, strict=True):
            for name in names:
                logs = _logs(folder, setting, name, found["seeds"])
                points = [
                    [sum(log[i][key] for log in logs) / len(logs) for i in range(min(map(len, logs)))]
                    for key in (REACHED["alignment"], PANELS[other])
                ]
                style = _style(names, name)
                axis.plot(*points, "-o", markersize=2.5, linewidth=1, color=style["color"], label=style["label"])
                axis.plot(points[0][-1], points[1][-1], "s", markersize=5.5, color=style["color"])
            axis.set_xlabel("held-out alignment")
            axis.set_ylabel(other)
            axis.set_title(setting["setting"], fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            if other == "path complexity":
                axis.set_yscale("symlog", linthresh=100)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(8, len(names)), frameon=False, fontsize=9)
    return figure


def _logs(folder: Path, setting: dict[str, Any], name: str, seeds: int) -> list[_figure.Log]:
    place = folder / setting["setting"] / "final" / name.replace(":", "-")
    return _study.logs([place / f"seed-{seed}" for seed in range(seeds)])


def _style(names: list[str], name: str) -> dict[str, Any]:
    colors = {NONE: "k", DECAY: "0.55", "label_smoothing": "#b8a25e", "fisher": _figure.COLORS[4]}
    further = [other for other in names if other not in colors]
    palette = (*_figure.COLORS[:4], _figure.COLORS[5])
    index = further.index(name) if name in further else 0
    color = colors.get(name) or (palette[index] if len(further) <= len(palette) else plt.cm.turbo(index / len(further)))
    return {"color": color, "label": _comparison.name_of({"method": name, "on_top": False})}
