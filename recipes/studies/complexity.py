r"""Does the complexity of the path predict the generalization gap?

This study trains MLPs with one hidden layer until the cross-entropy is below 0.01, over several widths, and at width
256 over several shares of redrawn labels. It compares the path complexity Σ ‖δw‖ ‖Φ‖ and norm-based measures, with and
without the margin (the tenth percentile over the training examples), with the gap between training and test accuracy.
The paper finds that path complexity and the measure of Neyshabur et al. follow the gap, and that the others do not.

    python recipes/studies/complexity.py                  # bundled digits: 21 runs, minutes on two cores
    python recipes/studies/complexity.py --dataset mnist --data_path FOLDER

The folder holds a run of train.py for each setting and seed, figure.png and findings.txt.
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/

from scipy.stats import spearmanr

from studies import study
from training.plots import COLORS, finish, pyplot

WIDTHS = (16, 64, 256, 1024)
SHARES = (0.0, 0.2, 0.4, 0.6)
PATH = "train/path_complexity"
MARGIN = ", margin"
GROUPS = {
    "width": {width: f"width {width}" for width in WIDTHS},
    "share of redrawn labels": {share: f"redrawn {share:g}" if share else "width 256" for share in SHARES},
}


def draw(runs: study.Runs) -> Any:
    """Draw the figure from the logs alone."""
    drawing, axes = pyplot().subplots(1, len(GROUPS), figsize=(5.5 * len(GROUPS), 3.8), layout="constrained")
    for axis, (what, group) in zip(axes, GROUPS.items(), strict=True):
        places = range(len(group))
        logs = study.logs({label: runs[label] for label in group.values()})
        for key in (None, PATH, *_norms(logs)):
            values = [[_gap(log) if key is None else log[-1][key] for log in of_seeds] for of_seeds in logs.values()]
            means = [statistics.mean(of_seeds) for of_seeds in values]
            top = max(abs(mean) for mean in means)
            spread = [study.spread(of_seeds) / top for of_seeds in values]
            thick = key in (None, PATH)
            style = {"linewidth": 2.2 if thick else 1, "linestyle": ":" if _name(key).endswith(MARGIN) else "-"}
            bars = {"yerr": spread, "capsize": 2, "color": _color(key), "label": _name(key)}
            axis.errorbar(places, [m / top for m in means], **bars, **style)
        axis.set_xticks(places, [f"{key:g}" for key in group])
        finish(axis, "", x=what, bottom=None, legend=False)
    axes[0].set_ylabel("share of the largest")
    axes[-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def findings(runs: study.Runs) -> list[str]:
    """Return what the logs show, one sentence each."""
    sentences = []
    for what, group in GROUPS.items():
        logs = study.logs({label: runs[label] for label in group.values()})
        gaps = [[_gap(log) for log in of_seeds] for of_seeds in logs.values()]
        related = {}
        for key in (PATH, *_norms(logs)):
            values = [[log[-1][key] for log in of_seeds] for of_seeds in logs.values()]
            related[_name(key)] = study.over_seeds(
                [float(spearmanr(v, g).statistic) for v, g in zip(zip(*values), zip(*gaps), strict=True)]  # noqa: B905
            )
        shown = ", ".join(f"{name} {value}" for name, value in related.items())
        reached = ", ".join(study.over_seeds(of_seeds) for of_seeds in gaps)
        sentences.append(f"For {what} {', '.join(f'{key:g}' for key in group)} the gap is {reached}.")
        sentences.append(f"Its rank correlation with each measure, mean ± s.d. over seeds: {shown}.")
        if not any(name.endswith(MARGIN) for name in related):
            sentences.append("Some of these runs have no positive margin, hence no measure with margin.")
        slow = sum(log[-1]["train/loss"] >= 0.01 for of_seeds in logs.values() for log in of_seeds)
        if slow:
            sentences.append(f"{slow} of these runs did not reach a cross-entropy of 0.01.")
    return sentences


def _gap(log: study.Log) -> float:
    return log[-1]["train/accuracy"] - log[-1]["test/accuracy"]


def _norms(logs: dict[str, list[study.Log]]) -> list[str]:
    """Return the measures that are defined in all runs; those with the margin need a positive one."""
    last = [log[-1] for of_seeds in logs.values() for log in of_seeds]
    return [key for key in last[0] if key.startswith("norm/") and all(math.isfinite(line[key]) for line in last)]


def _color(key: str | None) -> str:
    own = {None: "k", PATH: COLORS[5]}
    bases = ("Frobenius product", "spectral product", "path norm", "distance", "Bartlett 2017", "Neyshabur 2018")
    others = (*COLORS[:5], "0.5")
    return own[key] if key in own else others[bases.index(_name(key).removesuffix(MARGIN))]


def _name(key: str | None) -> str:
    return {None: "generalization gap", PATH: "path complexity"}.get(key, str(key).removeprefix("norm/"))


STUDY = study.Study(
    name="complexity",
    always={"model": "mlp", "depth": 2, "stop_loss": 0.01, "measure": "path,norms"},
    bundled={"lr": 0.05, "steps": 20000},
    settings={
        **{f"width {width}": {"hidden": width} for width in WIDTHS},
        **{f"redrawn {share:g}": {"hidden": 256, "label_noise": share} for share in SHARES if share},
    },
    draw=draw,
    findings=findings,
)

if __name__ == "__main__":
    study.main(STUDY, __doc__)
