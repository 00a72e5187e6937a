r"""Does the tangent kernel align with the labels during training, and in which layers?

This study follows the alignment with the labels on training and test examples, for an MLP of eight layers and a small
CNN, and the alignment of each layer's own kernel. The paper finds that alignment rises on both, and is highest in
hidden layers.

    python recipes/studies/alignment.py                   # bundled digits: six runs, minutes on two cores
    python recipes/studies/alignment.py --config recipes/configs/paper/mnist-mlp.yaml --data_path FOLDER

The folder holds a run of train.py for each setting and seed, figure.png and findings.txt.
"""

from __future__ import annotations

import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/

from studies import study
from training.plots import COLORS, STEPS, finish, pyplot


def draw(runs: study.Runs) -> Any:
    """Draw the figure from the logs alone."""
    drawing, axes = pyplot().subplots(1, 1 + len(runs), figsize=(4.2 * (1 + len(runs)), 3.4), layout="constrained")
    for (label, logs), color, axis in zip(study.logs(runs).items(), COLORS, axes[1:], strict=False):
        study.band(axes[0], logs, "test/alignment", color=color, label=f"{label}: test")
        study.band(axes[0], logs, "train/alignment", color=color, label="training examples", style=":")
        layers = _layers(logs[0])
        steps = [line["step"] + 1 for line in logs[0]]
        mean = [[statistics.mean(log[i][layer] for log in logs) for i in range(len(steps))] for layer in layers]
        edges = [0.7, *((a * b) ** 0.5 for a, b in pairwise(steps)), steps[-1] * 1.1]
        mesh = axis.pcolormesh(edges, range(len(layers) + 1), mean, cmap="viridis")
        axis.set_xscale("log")
        axis.set_xlabel(STEPS)
        axis.set_yticks([i + 0.5 for i in range(len(layers))], [str(i + 1) for i in range(len(layers))])
        axis.set_ylabel("layer, from the input")
        axis.set_title(f"{label}: alignment of each layer", fontsize=10)
        drawing.colorbar(mesh, ax=axis)
    finish(axes[0], "alignment with the labels")
    return drawing


def findings(runs: study.Runs) -> list[str]:
    """Return what the logs show, one sentence each."""
    sentences = []
    for label, logs in study.logs(runs).items():
        layers = _layers(logs[0])
        for part in ("train", "test"):
            key = f"{part}/alignment"
            tops = [max(log, key=lambda line: line[key]) for log in logs]
            first, most, last = (
                study.over_seeds([line[key] for line in lines])
                for lines in ([log[0] for log in logs], tops, [log[-1] for log in logs])
            )
            sentences.append(
                f"{label}: alignment on {part} examples is {first} at the start, {most} at its highest (step "
                f"{statistics.median(line['step'] for line in tops):g}), and {last} at the end."
            )
        best = [1 + max(range(len(layers)), key=lambda i, log=log: log[-1][layers[i]]) for log in logs]
        ends = [study.over_seeds([log[-1][layer] for log in logs]) for layer in layers]
        sentences.append(
            f"{label}: at the end the layer of highest alignment is {', '.join(map(str, best))} of {len(layers)} "
            f"(by seed); by layer, alignment is {', '.join(ends)}."
        )
    return sentences


def _layers(log: study.Log) -> list[str]:
    return [key for key in log[0] if key.startswith("layer/")]


STUDY = study.Study(
    name="alignment",
    always={"measure": "alignment,layers"},
    bundled={"init": "kaiming", "steps": 1500},
    settings={
        "MLP, 8 layers": {"model": "mlp", "depth": 8, "hidden": 80, "lr": 0.02},
        "CNN, 5 layers": {"model": "cnn", "depth": 5, "hidden": 16, "lr": 0.02},
    },
    draw=draw,
    findings=findings,
    configured={"as configured": {}},
)

if __name__ == "__main__":
    study.main(STUDY, __doc__)
