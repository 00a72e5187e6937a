r"""Does the tangent kernel lose rank during training, and how do random labels change that?

This study follows the effective rank, the trace ratio and the largest eigenvalues of the centered tangent kernel of 50
training examples, with 0, 20 and 50 % of the labels redrawn. The paper finds that the rank falls early, and that with
heavy noise it rises again while test accuracy falls.

    python recipes/studies/spectrum.py                    # bundled digits, MLP: nine runs, minutes on two cores
    python recipes/studies/spectrum.py --config recipes/configs/paper/cifar10-vgg19.yaml --data_path FOLDER

The folder holds a run of train.py for each setting and seed, figure.png and findings.txt.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/

from scipy.stats import spearmanr

from studies import study
from training.plots import COLORS, finish, pyplot

MEASUREMENTS = 5
"""The least number of measurements for a rank correlation."""
RANK = "train/effective_rank"
PANELS: dict[str, tuple[tuple[str, ...], float | None]] = {
    "test accuracy": (("test/accuracy",), 0),
    "effective rank": ((RANK,), 0),
    "share of the 40 largest eigenvalues": (("train/trace_ratio_40",), None),
    "largest eigenvalue, and 10th": (("train/eigenvalue_1", "train/eigenvalue_10"), None),
}
"""The curves of each panel, and the lower end of its axis."""


def draw(runs: study.Runs) -> Any:
    """Draw the figure from the logs alone."""
    drawing, axes = pyplot().subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    for (label, logs), color in zip(study.logs(runs).items(), COLORS, strict=False):
        for axis, (keys, _) in zip(axes, PANELS.values(), strict=True):
            for key in keys:
                study.band(axis, logs, key, color=color, label=label)
    for axis, (title, (_, bottom)) in zip(axes, PANELS.items(), strict=True):
        finish(axis, title, bottom=bottom, legend=axis is axes[0])
    axes[3].set_yscale("log")
    return drawing


def findings(runs: study.Runs) -> list[str]:
    """Return what the logs show, one sentence each."""
    sentences = []
    for label, logs in study.logs(runs).items():
        first, least, last, at, related = [], [], [], [], []
        for log in logs:
            ranks = [line[RANK] for line in log]
            low = min(range(len(ranks)), key=ranks.__getitem__)
            first.append(ranks[0])
            least.append(ranks[low])
            last.append(ranks[-1])
            at.append(log[low]["step"])
            accuracy = [line["test/accuracy"] for line in log]
            top = max(range(len(log)), key=accuracy.__getitem__)
            if len(log) - top >= MEASUREMENTS and len(set(accuracy[top:])) > 1:
                related.append(float(spearmanr(ranks[top:], accuracy[top:]).statistic))
        sentence = (
            f"{label}: the effective rank is {study.over_seeds(first)} at the start, {study.over_seeds(least)} at its "
            f"lowest (step {statistics.median(at):g}), and {study.over_seeds(last)} at the end"
        )
        if related:
            sentence += f"; after the best test accuracy, its rank correlation with it is {study.over_seeds(related)}"
        sentences.append(f"{sentence}.")
    return sentences


STUDY = study.Study(
    name="spectrum",
    always={"measure": "spectrum"},
    bundled={"model": "mlp", "depth": 6, "hidden": 80, "init": "kaiming", "steps": 3000},
    settings={
        "no random labels": {"label_noise": 0.0},
        "20 % random labels": {"label_noise": 0.2},
        "50 % random labels": {"label_noise": 0.5},
    },
    draw=draw,
    findings=findings,
)

if __name__ == "__main__":
    study.main(STUDY, __doc__)
