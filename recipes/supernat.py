r"""Does SuperNat keep linear regression from fitting noise features, where gradient descent fits them?

This recipe trains both on the same data from w = 0 and logs their errors and the complexity of the path at log-spaced
steps.

    python recipes/supernat.py
    python recipes/supernat.py --gauge max 0.05 --noise_features 40 --output_dir runs/gauges

The data, for each number k of noise features and each seed, in float64: x ~ N(0, I) has d_signal + k entries; a vector
w of d_signal entries is uniform on the unit sphere; y = Σ_{j ≤ d_signal} w_j x_j + noise·ε with ε ~ N(0, 1). There are
n training examples and n_validation validation examples from the same distribution. One torch generator, seeded with
seed, draws in this order: all x (the training ones first), w, ε. The validation error is the mean of (f(x) − y)², where
y includes its noise, so the true function has an error of noise² on average. The loss is ‖f − y‖²/2n.

The answer depends on SuperNat's gauge κ: "max" keeps the largest eigenvalue fixed, and learning continues; with a fixed
κ, all eigenvalues fall once the |a_j| are below it, and learning stops.

The new folder holds config.json (flags, command, versions), metrics.jsonl (a line for each k, seed and logged step) and
figure.png. The figure and the table are made from metrics.jsonl alone; "best" is the best logged step, chosen on the
validation examples.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # python -m does not look here

import torch
from torch import Tensor

from alignreg.linear import GradientDescent, SuperNat
from studies import study
from training import messages, plots, run_folder

Model = GradientDescent | SuperNat
NAMES = {"gd": "gradient descent", "truth": "true function"}


@messages.in_words()
def main() -> None:
    """Run from the command line."""
    run(vars(_parser().parse_args()))


def run(config: dict[str, Any]) -> None:
    """Train for each k and seed, then draw the figure and print the table.

    Raises:
        ValueError: if the folder is not empty, or a method diverges.
    """
    plots.pyplot()  # fails before the work, not after it
    folder = run_folder.claim(config["output_dir"], "supernat")
    with run_folder.unclaimed_on_failure(folder):
        run_folder.save_config(folder, config)
    start = time.perf_counter()
    for k in config["noise_features"]:
        for seed in range(config["seeds"]):
            try:
                train(folder, k, seed, config)
            except RuntimeError as error:
                raise messages.ToldError(f"{k} noise features, seed {seed}: {error}") from error
    draw(folder)
    print_table(folder)
    print(f"log:    {run_folder.log_of(folder)}")
    print(f"figure: {folder / 'figure.png'}  ({time.perf_counter() - start:.0f} s)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--noise_features",
        type=_count,
        nargs="+",
        default=[10, 40, 100],
        help="numbers k, one panel each",
    )
    add("--seeds", type=_positive, default=10, help="number of data sets for each k")
    add("--steps", type=_positive, default=1000, help="steps of gradient descent")
    add("--n", type=_positive, default=50, help="training examples")
    add("--n_validation", type=_positive, default=1000, help="validation examples")
    add("--d_signal", type=_positive, default=5, help="informative features")
    add("--lr", type=_amount, default=0.05, help="step size of both methods")
    add("--noise", type=_amount, default=1.0, help="standard deviation of the noise of the targets")
    add(
        "--gauge",
        type=_gauge,
        nargs="+",
        default=["max"],
        help="of SuperNat: max, trace, mean, or a number κ > 0",
    )
    add("--output_dir", help="a new or empty folder; by default one under runs/")
    return parser


def _count(text: str, least: int = 0) -> int:
    if (value := int(text)) < least:
        raise argparse.ArgumentTypeError(f"expected {least} or more, got {text}")
    return value


def _positive(text: str) -> int:
    return _count(text, 1)


def _amount(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _gauge(text: str) -> str | float:
    return text if text in {"max", "trace", "mean"} else _amount(text)


def draw_data(k: int, seed: int, config: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, y and the true function of the training and validation examples, drawn as the header says."""
    generator = torch.Generator().manual_seed(seed)
    total, d = config["n"] + config["n_validation"], config["d_signal"]
    x = torch.randn(total, d + k, generator=generator, dtype=torch.float64)
    w = torch.randn(d, generator=generator, dtype=torch.float64)
    truth = x[:, :d] @ (w / w.norm())
    return x, truth + config["noise"] * torch.randn(total, generator=generator, dtype=torch.float64), truth


def log_spaced(steps: int) -> set[int]:
    """Return about 12 steps for each factor of ten, with 0 and the last step."""
    grown = (round(10 ** (i / 12)) for i in range(12 * len(str(steps))))
    return {0, steps, *(step for step in grown if step < steps)}


def train(folder: Path, k: int, seed: int, config: dict[str, Any]) -> None:
    """Train every method on one data set and log it."""
    x, y, truth = draw_data(k, seed, config)
    n, lr = config["n"], config["lr"]
    models: dict[str, Model] = {"gd": GradientDescent(x[:n], y[:n], lr=lr)}
    models |= {f"supernat-{gauge}": SuperNat(x[:n], y[:n], lr=lr, gauge=gauge) for gauge in config["gauge"]}
    logged = log_spaced(config["steps"])
    for step in range(config["steps"] + 1):
        if step:
            for model in models.values():
                model.step()
        if step in logged:
            line = {"noise_features": k, "seed": seed, "step": step}
            line["truth/validation_error"] = float((truth[n:] - y[n:]).square().mean())
            for name, model in models.items():
                line[f"{name}/train_error"] = float((model.outputs - y[:n]).square().mean())
                line[f"{name}/validation_error"] = float((model.predict(x[n:]) - y[n:]).square().mean())
                line[f"{name}/complexity"] = float(model.complexity)
            run_folder.append(folder, line)


def by_k(log: plots.Log) -> dict[int, list[plots.Log]]:
    """Return the logs of the seeds for each number of noise features."""
    runs: dict[int, dict[float, plots.Log]] = {}
    for line in log:
        runs.setdefault(int(line["noise_features"]), {}).setdefault(line["seed"], []).append(line)
    return {k: list(seeds.values()) for k, seeds in runs.items()}


def methods(log: plots.Log) -> list[str]:
    """Return the methods of a log."""
    return [key.split("/")[0] for key in log[0] if key.endswith("/complexity")]


def _name(method: str) -> str:
    return NAMES.get(method) or f"SuperNat, gauge {method.removeprefix('supernat-')}"


def draw(folder: Path) -> None:
    """Draw the validation errors during training, with a panel for each k."""
    log = run_folder.read(folder)
    panels = by_k(log)
    size = (3.5, 0.8 + 1.7 * len(panels))  # the column of a paper, with 8-point type
    figure, axes = plots.pyplot().subplots(
        len(panels), 1, figsize=size, layout="constrained", sharex=True, squeeze=False
    )
    for axis, (k, seeds) in zip(axes[:, 0], panels.items(), strict=True):
        for index, method in enumerate(methods(log)):
            line = {"color": plots.COLORS[index % len(plots.COLORS)], "linewidth": 1.4, "label": _name(method)}
            study.band(axis, seeds, f"{method}/validation_error", style="--" if index else "-", **line)
        truth = statistics.mean(study.means(seeds, "truth/validation_error"))
        axis.axhline(truth, color="0.4", linestyle=":", linewidth=1, label=_name("truth"))
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.set_title(f"{k} noise features", fontsize=8)
        axis.set_ylabel("validation error", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("steps + 1", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    plots.save(figure, folder / "figure.png", 200)


def print_table(folder: Path) -> None:
    """Print the errors at the end and at the best step, as mean ± standard deviation over seeds."""
    log = run_folder.read(folder)
    headings = ("noise\nfeatures", "method", "validation error\nat the end", "validation error\nat the best step")
    lines = []
    for k, seeds in by_k(log).items():
        for method in methods(log):
            error = f"{method}/validation_error"
            best = [min(run, key=lambda line: line[error]) for run in seeds]
            shown = [_mean([run[-1][error] for run in seeds]), _mean([line[error] for line in best])]
            shown.append(str(statistics.median_low([int(line["step"]) for line in best])))
            shown += [_mean([run[-1][f"{method}/{key}"] for run in seeds]) for key in ("train_error", "complexity")]
            lines.append([str(k), _name(method), *shown])
    headings += ("best step\n(median)", "training error\nat the end", "complexity\nat the end")
    plots.print_lines(headings, lines, width=118, left="method")


def _mean(values: list[float]) -> str:
    form = ".2f" if max(map(abs, values)) < 1e4 else ".1e"
    return f"{statistics.mean(values):{form}} ± {study.spread(values):{form}}"


if __name__ == "__main__":
    main()
