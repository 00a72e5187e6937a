r"""Does the tangent kernel lose rank in training, and what do random labels do to that?

Effective rank, trace ratio and the largest eigenvalues of the centered tangent kernel of 50 training examples, along
training, with 0, 20 and 50 % of the labels redrawn. The paper finds that the rank falls early, and with heavy noise
rises again while test accuracy falls.

    python recipes/studies/spectrum.py                    # bundled digits, MLP: nine runs, minutes on two cores
    python recipes/studies/spectrum.py --config recipes/configs/paper/cifar10-vgg19.yaml --data_path FOLDER

The folder holds a run of train.py for each setting and seed, figure.png and findings.txt.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/

from scipy.stats import spearmanr

from studies import study
from training.plots import COLORS, finish, pyplot, save

MEASUREMENTS = 5
"""How many a rank correlation takes at least."""
RANK, RATIO = "train/effective_rank", "train/trace_ratio_40"


def draw(runs: study.Runs, figure: Path) -> None:
    """Draw the figure from the logs alone."""
    drawing, axes = pyplot().subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    for (label, folders), color in zip(runs.items(), COLORS, strict=False):
        found = study.logs(folders)
        study.band(axes[0], found, "test/accuracy", color=color, label=label)
        study.band(axes[1], found, RANK, color=color, label=label)
        study.band(axes[2], found, RATIO, color=color, label=label)
        for j in (1, 10):
            name = label if j == 1 else None
            study.band(axes[3], found, f"train/eigenvalue_{j}", color=color, label=name)
    for axis, title, bottom in zip(
        axes,
        ("test accuracy", "effective rank", "share of the 40 largest eigenvalues", "largest eigenvalue, and 10th"),
        (0, 0, None, None),
        strict=True,
    ):
        finish(axis, title, bottom=bottom, legend=axis is axes[0])
    axes[3].set_yscale("log")
    save(drawing, figure)


def findings(runs: study.Runs) -> list[str]:
    """Return what the numbers say, a sentence each."""
    sentences = []
    for label, folders in runs.items():
        first, least, last, at, related = [], [], [], [], []
        for log in study.logs(folders):
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
            f"{label}: effective rank {study.over_seeds(first)} at the start, at its lowest "
            f"{study.over_seeds(least)} (step {statistics.median(at):g}), {study.over_seeds(last)} at the end"
        )
        if related:
            sentence += f"; from the best test accuracy on, rank correlation with it {study.over_seeds(related)}"
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
