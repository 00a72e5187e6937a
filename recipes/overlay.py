r"""Draw runs of the same task side by side: one figure and one table, from their logs alone.

    python recipes/overlay.py runs/demo-1/none runs/demo-1/complexity --output_dir runs/demo-1

The command accepts any number of folders that recipes/train.py wrote.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # python -m does not look here

from training import messages, plots, run_folder, storage

TASK = ("dataset", "model", "label_noise", "train_size", "mix", "mix_size")


@messages.in_words()
def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for figure.png")
    arguments = parser.parse_args()
    try:
        configs: list[dict[str, Any]] = [run_folder.made(run)["config"] for run in arguments.runs]
        logs = [run_folder.read(run) for run in arguments.runs]
    except OSError as error:
        raise messages.ToldError(f"expected the folder of a run, but {error.filename}: {error.strerror}.") from None
    tasks = {", ".join(f"{key} {config[key]}" for key in TASK) for config in configs}
    if len(tasks) > 1:
        raise messages.ToldError(f"expected runs of one task, got {' and '.join(sorted(tasks))}.")
    names = [plots.label(config) for config in configs]
    labels = [
        name if names.count(name) == 1 else f"{name} ({run.name})"
        for name, run in zip(names, arguments.runs, strict=True)
    ]
    with storage.writing(arguments.output_dir):
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
    figure = arguments.output_dir / "figure.png"
    plots.draw(dict(zip(labels, logs, strict=True)), plots.task(configs[-1]), figure)
    columns = ("regularizer", "train\naccuracy", "test accuracy\nlast", "test accuracy\nbest", "alignment\non test")
    lines = [
        (
            name,
            f"{log[-1]['train/accuracy']:.3f}",
            f"{log[-1]['test/accuracy']:.3f}",
            f"{max(line['test/accuracy'] for line in log):.3f}",
            f"{log[-1]['test/alignment']:.3f} ± {log[-1]['test/alignment_std_error']:.3f}",
            f"{log[-1]['train/effective_rank']:.1f}",
            f"{log[-1]['train/path_complexity']:.0f}",
        )
        for name, log in zip(labels, logs, strict=True)
    ]
    plots.print_lines((*columns, "effective\nrank", "path\ncomplexity"), lines, width=140, left="regularizer")
    print(f"figure: {figure}")


if __name__ == "__main__":
    main()
