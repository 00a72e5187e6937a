r"""Do features align with easy examples before difficult ones, and how does depth change that?

Alignment within 50 easy and 50 difficult training examples along training, for MLPs of 3, 6 and 9 layers: difficult are
examples with a redrawn label, or digits turned by a quarter that are mixed in. The paper finds that easy examples align
faster and higher, and the more so the deeper the network.

    python recipes/studies/hierarchy.py                   # bundled digits: eighteen runs, minutes on two cores
    python recipes/studies/hierarchy.py --config recipes/configs/paper/mnist-kmnist-mlp.yaml

The folder holds a run of train.py for each setting and seed, figure.png and findings.txt.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/

from studies import study
from training.plots import COLORS, finish, pyplot, save

DEPTHS = (3, 6, 9)
KINDS = {
    "random labels": {"label_noise": 0.1},
    "second data set": {"train_size": 900, "mix": "rotated_digits", "mix_size": 100},
}


def draw(runs: study.Runs, figure: Path) -> None:
    """Draw the figure from the logs alone."""
    kinds = list(dict.fromkeys(label.rpartition(",")[0] for label in runs))
    drawing, axes = pyplot().subplots(1, 1 + len(kinds), figsize=(4.2 * (1 + len(kinds)), 3.4), layout="constrained")
    for kind, axis, mark in zip(kinds, axes, "os", strict=False):
        ratios = []
        for depth, color in zip(DEPTHS, COLORS, strict=False):
            found = study.logs(runs[f"{kind}, {depth} layers"])
            study.band(axis, found, "easy/alignment", color=color, label=f"easy, {depth} layers")
            study.band(axis, found, "difficult/alignment", color=color, label="difficult", style=":")
            ratios.append([_ratio(log) for log in found])
        finish(axis, f"{kind}: alignment within a group")
        middle = [statistics.mean(values) for values in ratios]
        spread = [statistics.stdev(values) if len(values) > 1 else 0 for values in ratios]
        axes[-1].errorbar(DEPTHS, middle, spread, fmt=f"{mark}-", capsize=3, label=kind)
    axes[-1].set(xlabel="layers", xticks=DEPTHS, ylim=(0, None))
    axes[-1].set_title("highest alignment, easy / difficult", fontsize=10)
    axes[-1].legend(frameon=False, fontsize=8)
    axes[-1].spines[["top", "right"]].set_visible(False)
    save(drawing, figure)


def findings(runs: study.Runs) -> list[str]:
    """Return what the numbers say, a sentence each."""
    sentences = []
    for label, folders in runs.items():
        found = study.logs(folders)
        tops = {
            group: [max(line[f"{group}/alignment"] for line in log) for log in found] for group in ("easy", "difficult")
        }
        half = {group: statistics.median(_half_way(log, group) for log in found) for group in tops}
        ahead = sum(e > d for e, d in zip(tops["easy"], tops["difficult"], strict=True))
        sentences.append(
            f"{label}: highest alignment {study.over_seeds(tops['easy'])} of easy and "
            f"{study.over_seeds(tops['difficult'])} of difficult examples, easy ahead in {ahead} of {len(found)} "
            f"seeds; half way up at step {half['easy']:g} and {half['difficult']:g}; ratio "
            f"{study.over_seeds([_ratio(log) for log in found])}."
        )
    return sentences


def _ratio(log: study.Log) -> float:
    easy, difficult = (max(line[f"{group}/alignment"] for line in log) for group in ("easy", "difficult"))
    return easy / difficult


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
