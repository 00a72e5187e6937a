r"""Does the tangent kernel align with the labels in training, and in which layers?

Alignment with the labels along training, on training and test examples, of an MLP of eight layers and a small CNN; and
of each layer's own kernel. The paper finds that it rises on both, and is highest in hidden layers.

    python recipes/alignment.py                             # bundled digits: six runs, minutes on two cores
    python recipes/alignment.py --config recipes/configs/paper/mnist-mlp.yaml --data_path FOLDER

The folder holds a run of train.py for each setting and seed, figure.png and findings.txt.
"""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, final

import _study
from _figure import COLORS, finish, pyplot, save


@final
class Alignment(_study.Study):
    """Alignment along training and depth."""

    name = "alignment"
    always = "--measure alignment,layers"
    bundled = "--init kaiming --steps 1500"
    settings: ClassVar[dict[str, str]] = {
        "MLP, 8 layers": "--model mlp --depth 8 --hidden 80 --lr 0.02",
        "CNN, 5 layers": "--model cnn --depth 5 --hidden 16 --lr 0.02",
    }
    configured: ClassVar[dict[str, str] | None] = {"as configured": ""}

    def draw(self, runs: _study.Runs, figure: Path) -> None:
        """See the base class."""
        drawing, axes = pyplot().subplots(1, 1 + len(runs), figsize=(4.2 * (1 + len(runs)), 3.4), layout="constrained")
        for (label, folders), color, axis in zip(runs.items(), COLORS, axes[1:], strict=False):
            found = _study.logs(folders)
            _study.band(axes[0], found, "test/alignment", color=color, label=f"{label}: test")
            _study.band(axes[0], found, "train/alignment", color=color, label="training examples", style=":")
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

    def findings(self, runs: _study.Runs) -> list[str]:
        """See the base class."""
        sentences = []
        for label, folders in runs.items():
            found = _study.logs(folders)
            layers = _layers(found[0])
            for part in ("train", "test"):
                key = f"{part}/alignment"
                tops = [max(log, key=lambda line: line[key]) for log in found]
                first, most, last = (
                    _study.over_seeds([line[key] for line in lines])
                    for lines in ([log[0] for log in found], tops, [log[-1] for log in found])
                )
                sentences.append(
                    f"{label}: alignment on {part} examples {first} at the start, {most} at its highest (step "
                    f"{statistics.median(line['step'] for line in tops):g}), {last} at the end."
                )
            best = [1 + max(range(len(layers)), key=lambda i, log=log: log[-1][layers[i]]) for log in found]
            ends = [_study.over_seeds([log[-1][layer] for log in found]) for layer in layers]
            sentences.append(
                f"{label}: at the end the layer of highest alignment is {', '.join(map(str, best))} of {len(layers)} "
                f"(by seed); by layer {', '.join(ends)}."
            )
        return sentences


def _layers(log: _study.Log) -> list[str]:
    return [key for key in log[0] if key.startswith("layer/")]


if __name__ == "__main__":
    _study.main(Alignment(), __doc__)
