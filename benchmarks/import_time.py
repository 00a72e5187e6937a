"""Measure the time of `import alignreg` after `import torch, torchmetrics`.

    python benchmarks/import_time.py [--runs 10] [--json benchmarks/import_time.json]

Each run is a fresh process that imports torch and torchmetrics, then alignreg; a first run writes the bytecode. The
rows are medians over runs of wall and CPU seconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

IMPORTS = ("torch, torchmetrics", "alignreg")
CODE = """
import time
for names in {imports}:
    wall, cpu = time.perf_counter(), time.process_time()
    exec("import " + names)
    print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def measure():
    run = [sys.executable, "-c", CODE.format(imports=IMPORTS)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    found = subprocess.run(run, capture_output=True, check=True, text=True, env=environment)  # noqa: S603
    return [tuple(map(float, line.split())) for line in found.stdout.splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    measure()
    runs = [measure() for _ in range(args.runs)]
    rows = []
    for names, pairs in zip(IMPORTS, zip(*runs, strict=True), strict=True):
        wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append({"imports": names, "runs": args.runs, "wall_seconds": wall, "cpu_seconds": cpu})
        print(f"import {names:20} {wall:.3f} s, CPU {cpu:.3f} s, median of {args.runs}")
    args.json.write_text(json.dumps({"import": rows, "torch": torch.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main()
