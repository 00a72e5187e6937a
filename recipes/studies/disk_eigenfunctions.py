r"""Do the leading eigenfunctions of the tangent kernel assume the shape of the classes?

An MLP learns to tell points inside a disk from points outside. Before, during and after training, this study draws the
difference f of its two outputs, the leading eigenfunctions of f's tangent kernel, and the norms of f's input gradient
and of its tangent features over the plane, and it follows the ratio of the 20th eigenvalue to the first. The paper
finds the class boundary in the leading eigenfunctions.

    python recipes/studies/disk_eigenfunctions.py         # three runs, minutes on two cores
    python recipes/studies/disk_eigenfunctions.py --dataset yin_yang

The folder holds a run of train.py for each seed, with plane-STEP.safetensors, and figure.png and findings.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/

import torch
from safetensors.torch import load_file

from alignreg import plotting
from studies import study
from training.plots import COLORS, finish, pyplot

FUNCTIONS = 4


def draw(runs: study.Runs) -> Any:
    """Draw the figure from the logs alone."""
    (folders,), (logs,) = runs.values(), study.logs(runs).values()
    steps = [int(line["step"]) for line in logs[0]]
    shown = [steps[0], steps[len(steps) // 2], steps[-1]]
    names = ["f", *(f"eigenfunction {j + 1}" for j in range(FUNCTIONS)), "|∂f/∂x|", "|∂f/∂w|"]
    drawing = pyplot().figure(figsize=(1.55 * len(names) + 3.4, 5.2), layout="constrained")
    grid = drawing.add_gridspec(len(shown), len(names) + 2)
    for row, step in enumerate(shown):
        plane = load_file(folders[0] / f"plane-{step}.safetensors")
        side = torch.linspace(-1, 1, round(len(plane["outputs"]) ** 0.5))
        axes = [drawing.add_subplot(grid[row, column]) for column in range(len(names))]
        signed = torch.column_stack([plane["outputs"], plane["eigenfunctions"][:, :FUNCTIONS]])
        norms = torch.column_stack([plane["input_gradient"], plane["tangent_norm"]])
        for values, columns in ((signed, slice(None, FUNCTIONS + 1)), (norms, slice(FUNCTIONS + 1, None))):
            plotting.plane(
                values,
                side,
                side,
                axes[columns],
                names=names[columns] if row == 0 else [""] * values.shape[1],
                boundary=plane["outputs"],
                signed=values is signed,
            )
        for axis in axes:
            axis.set(xticks=[], yticks=[], xlabel="", ylabel="")
        axes[0].set_ylabel(f"step {step}", fontsize=9)
    axis = drawing.add_subplot(grid[:, -2:])
    study.band(axis, logs, "plane/ratio_20", color=COLORS[0], label="not centered")
    study.band(axis, logs, "plane/ratio_20_centered", color=COLORS[1], label="centered")
    finish(axis, "20th eigenvalue / 1st")
    drawing.suptitle("seed 0; the line is where f = 0", fontsize=9)
    return drawing


def findings(runs: study.Runs) -> list[str]:
    """Return what the logs show, one sentence each."""
    (logs,) = study.logs(runs).values()
    parts = []
    for key, name in (
        ("plane/ratio_20", "the 20th eigenvalue over the first"),
        ("plane/ratio_20_centered", "the same ratio of the centered kernel"),
        ("plane/alignment", "alignment"),
    ):
        first, last = ([log[i][key] for log in logs] for i in (0, -1))
        parts.append(f"{name} is {study.over_seeds(first)} at the start and {study.over_seeds(last)} at the end")
    accuracy = study.over_seeds([log[-1]["test/accuracy"] for log in logs])
    return [f"Over the plane, {'; '.join(parts)}; test accuracy is {accuracy}."]


STUDY = study.Study(
    name="disk_eigenfunctions",
    always={"measure": "plane", "kernel_size": 100},
    bundled={
        "dataset": "disk",
        "depth": 6,
        "hidden": 256,
        "init": "kaiming",
        "batch_size": 100,
        "momentum": 0.0,
        "steps": 2000,
    },
    settings={"plane": {}},
    draw=draw,
    findings=findings,
)

if __name__ == "__main__":
    study.main(STUDY, __doc__)
