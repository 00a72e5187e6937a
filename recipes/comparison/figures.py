"""The figures of a comparison: the paths of its runs, and explicit beside implicit alignment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comparison.methods import DECAY, NONE, SMOOTHING, words
from comparison.plan import Row
from studies import study
from studies.jobs import broken_off
from training import plots
from training.plots import COLORS, Log, pyplot

TEST, ALIGNMENT = "test/accuracy", "test/kernel_alignment"
RANK, PATH = "train/effective_rank", "train/path_complexity"
PANELS = {"test accuracy": TEST, "held-out alignment": ALIGNMENT, "effective rank": RANK, "path complexity": PATH}
FIXED = {
    NONE: "k",
    DECAY: "0.55",
    SMOOTHING: "#c9b458",
    "fisher": COLORS[4],
    "alignment": COLORS[0],
    "complexity": COLORS[1],
    "participation_ratio": COLORS[2],
    "kare": COLORS[3],
}
SHOWN = (NONE, DECAY, "alignment", "complexity")
"""The methods in the figure of explicit and implicit alignment."""


def draw(folder: Path, settings: list[dict[str, Any]], seeds: int) -> list[Path]:
    """Draw the figures into the comparison's folder, and return their paths."""
    names = [row["method"] for row in settings[0]["rows"] if not row["on_top"]]
    logs: dict[str, dict[str, list[Log]]] = {}
    for setting in settings:
        place = folder / setting["setting"] / "final"
        runs = {name: [place / Row(name).slug / f"seed-{seed}" for seed in range(seeds)] for name in names}
        whole = {name: [run for run in of_method if not broken_off(run)] for name, of_method in runs.items()}
        logs[setting["setting"]] = {name: of_seeds for name, of_seeds in study.logs(whole).items() if of_seeds}
    drawn = []
    for name, make, dpi in (("paths", _paths, 75), ("explicit", _explicit, 110)):
        figure = make(logs, _styles(names))
        drawn.append(folder / f"{name}.png")
        plots.save(figure, drawn[-1], dpi)
    return drawn


def _paths(logs: dict[str, dict[str, list[Log]]], styles: dict[str, dict[str, Any]]) -> Any:
    """Draw the measurements during training, with a row of panels for each setting."""
    shape = (len(logs), len(PANELS))
    size = (3.4 * shape[1], 2.5 * shape[0] + 0.6)
    figure, axes = pyplot().subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    for line, (setting, of_methods) in zip(axes, logs.items(), strict=True):
        for axis, (title, key) in zip(line, PANELS.items(), strict=True):
            for name, of_seeds in of_methods.items():
                study.band(axis, of_seeds, key, **styles[name])
            plots.finish(axis, f"{setting}: {title}", legend=False)
            if key == PATH:
                axis.set_yscale("symlog", linthresh=100)
            elif key == TEST:
                axis.set_ylim(0.5, 1)
    return _with_legend(figure, axes)


def _explicit(logs: dict[str, dict[str, list[Log]]], styles: dict[str, dict[str, Any]]) -> Any:
    """Draw effective rank and path complexity against held-out alignment; a square marks the end."""
    others = {"effective rank": RANK, "path complexity": PATH}
    columns = min(4, len(logs))
    lines = -(-len(logs) // columns)
    shape = (len(others) * lines, columns)
    size = (max(5.8, 2.9 * columns), 2.5 * shape[0] + 0.4)
    figure, axes = pyplot().subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for place, (setting, of_methods) in enumerate(logs.items()):
        for line, (title, key) in enumerate(others.items()):
            axis = axes[len(others) * (place // columns) + line, place % columns]
            axis.set_visible(True)
            for name in [name for name in SHOWN if name in of_methods]:
                x, y = (study.means(of_methods[name], part) for part in (ALIGNMENT, key))
                axis.plot(x, y, "-o", markersize=2.5, linewidth=1, **styles[name])
                axis.plot(x[-1], y[-1], "s", markersize=5.5, color=styles[name]["color"])
            axis.set_xlabel("held-out alignment", fontsize=9)
            axis.set_ylabel(title, fontsize=9)
            axis.set_title(setting, fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            if key == PATH:
                axis.set_yscale("symlog", linthresh=100)
    return _with_legend(figure, axes)


def _with_legend(figure: Any, axes: Any) -> Any:
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(8, len(labels)), frameon=False, fontsize=9)
    return figure


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    further = [name for name in names if name not in FIXED]
    own = {name: pyplot().get_cmap("turbo")((index + 0.5) / len(further)) for index, name in enumerate(further)}
    return {name: {"color": {**FIXED, **own}[name], "label": words(name)} for name in names}
