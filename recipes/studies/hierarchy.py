r"""Do features align with easy examples before difficult ones, and how does depth change that?

This study follows the alignment within 50 easy and 50 difficult training examples, for MLPs of 3, 6 and 9 layers. The
difficult examples have a redrawn label, or are digits rotated by a quarter turn and mixed in. The paper finds that easy
examples align faster and more, and that the difference grows with depth.

    python recipes/studies/hierarchy.py                   # bundled digits: eighteen runs, minutes on two cores
    python recipes/studies/hierarchy.py --config recipes/configs/paper/mnist-kmnist-mlp.yaml

The folder holds a run of train.py for each setting and seed, figure.png and findings.txt.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/

from studies import study
from training.plots import COLORS, finish, pyplot

DEPTHS = (3, 6, 9)
KINDS = {
    "random labels": {"label_noise": 0.1},
    "second data set": {"train_size": 900, "mix": "rotated_digits", "mix_size": 100},
}


def draw(runs: study.Runs) -> Any:
    """Draw the figure from the logs alone."""
    logs, kinds = study.logs(runs), list(dict.fromkeys(label.rpartition(",")[0] for label in runs))
    drawing, axes = pyplot().subplots(1, 1 + len(kinds), figsize=(4.2 * (1 + len(kinds)), 3.4), layout="constrained")
    for kind, axis, mark in zip(kinds, axes, "os", strict=False):
        ratios = []
        for depth, color in zip(DEPTHS, COLORS, strict=False):
            of_seeds = logs[f"{kind}, {depth} layers"]
            study.band(axis, of_seeds, "easy/alignment", color=color, label=f"easy, {depth} layers")
            study.band(axis, of_seeds, "difficult/alignment", color=color, label="difficult", style=":")
            ratios.append([_ratio(log) for log in of_seeds])
        finish(axis, f"{kind}: alignment within a group")
        middle, spread = ([*map(measure, ratios)] for measure in (statistics.mean, study.spread))
        axes[-1].errorbar(DEPTHS, middle, spread, fmt=f"{mark}-", capsize=3, label=kind)
    axes[-1].set_xticks(DEPTHS)
    finish(axes[-1], "highest alignment, easy / difficult", x="layers")
    return drawing


def findings(runs: study.Runs) -> list[str]:
    """Return what the logs show, one sentence each."""
    sentences = []
    for label, logs in study.logs(runs).items():
        tops = {group: [_highest(log, group) for log in logs] for group in ("easy", "difficult")}
        half = {group: statistics.median(_half_way(log, group) for log in logs) for group in tops}
        ahead = sum(e > d for e, d in zip(tops["easy"], tops["difficult"], strict=True))
        sentences.append(
            f"{label}: the highest alignment is {study.over_seeds(tops['easy'])} for easy and "
            f"{study.over_seeds(tops['difficult'])} for difficult examples, with easy ahead in {ahead} of {len(logs)} "
            f"seeds; half of the rise is reached at step {half['easy']:g} and {half['difficult']:g}; the ratio is "
            f"{study.over_seeds([_ratio(log) for log in logs])}."
        )
    return sentences


def _ratio(log: study.Log) -> float:
    return _highest(log, "easy") / _highest(log, "difficult")


def _highest(log: study.Log, group: str) -> float:
    return max(line[f"{group}/alignment"] for line in log)


def _half_way(log: study.Log, group: str) -> float:
    values = [line[f"{group}/alignment"] for line in log]
    middle = (values[0] + max(values)) / 2
    return next(line["step"] for line, value in zip(log, values, strict=True) if value >= middle)


STUDY = study.Study(
    name="hierarchy",
    always={"model": "mlp", "measure": "groups"},
    bundled={"hidden": 60, "init": "kaiming", "lr": 0.01, "batch_size": 100, "steps": 3000},
    settings={f"{kind}, {d} layers": {**own, "depth": d} for kind, own in KINDS.items() for d in DEPTHS},
    draw=draw,
    findings=findings,
    configured={f"as configured, {d} layers": {"depth": d} for d in DEPTHS},
)

if __name__ == "__main__":
    study.main(STUDY, __doc__)
