r"""Does the tangent kernel align with the labels in training, and in which layers?

Alignment with the labels along training, on training and test examples, of an MLP of eight layers and a small CNN; and
of each layer's own kernel. The paper finds that it rises on both, and is highest in hidden layers.

    python recipes/studies/alignment.py                   # bundled digits: six runs, minutes on two cores
    python recipes/studies/alignment.py --config recipes/configs/paper/mnist-mlp.yaml --data_path FOLDER

The folder holds a run of train.py for each setting and seed, figure.png and findings.txt.
"""

from __future__ import annotations

import statistics
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/

from studies import study
from training.plots import COLORS, finish, pyplot, save


def draw(runs: study.Runs, figure: Path) -> None:
    """Draw the figure from the logs alone."""
    drawing, axes = pyplot().subplots(1, 1 + len(runs), figsize=(4.2 * (1 + len(runs)), 3.4), layout="constrained")
    for (label, folders), color, axis in zip(runs.items(), COLORS, axes[1:], strict=False):
        found = study.logs(folders)
        study.band(axes[0], found, "test/alignment", color=color, label=f"{label}: test")
        study.band(axes[0], found, "train/alignment", color=color, label="training examples", style=":")
        layers = _layers(found[0])
        steps = [line["step"] + 1 for line in found[0]]
        mean = [[statistics.mean(log[i][layer] for log in found) for i in range(len(steps))] for layer in layers]
        edges = [0.7, *((a * b) ** 0.5 for a, b in pairwise(steps)), steps[-1] * 1.1]
        mesh = axis.pcolormesh(edges, range(len(layers) + 1), mean, cmap="viridis")
        axis.set_xscale("log")
        axis.set_xlabel("optimizer steps + 1")
        axis.set_yticks([i + 0.5 for i in range(len(layers))], [str(i + 1) for i in range(len(layers))])
        axis.set_ylabel("layer, from the input")
        axis.set_title(f"{label}: alignment of each layer", fontsize=10)
        drawing.colorbar(mesh, ax=axis)
    finish(axes[0], "alignment with the labels")
    save(drawing, figure)


def findings(runs: study.Runs) -> list[str]:
    """Return what the numbers say, a sentence each."""
    sentences = []
    for label, folders in runs.items():
        found = study.logs(folders)
        layers = _layers(found[0])
        for part in ("train", "test"):
            key = f"{part}/alignment"
            tops = [max(log, key=lambda line: line[key]) for log in found]
            first, most, last = (
                study.over_seeds([line[key] for line in lines])
                for lines in ([log[0] for log in found], tops, [log[-1] for log in found])
            )
            sentences.append(
                f"{label}: alignment on {part} examples {first} at the start, {most} at its highest (step "
                f"{statistics.median(line['step'] for line in tops):g}), {last} at the end."
            )
        best = [1 + max(range(len(layers)), key=lambda i, log=log: log[-1][layers[i]]) for log in found]
        ends = [study.over_seeds([log[-1][layer] for log in found]) for layer in layers]
        sentences.append(
            f"{label}: at the end the layer of highest alignment is {', '.join(map(str, best))} of {len(layers)} "
            f"(by seed); by layer {', '.join(ends)}."
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
