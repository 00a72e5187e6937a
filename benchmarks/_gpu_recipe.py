"""The training recipe on the device: an uninterrupted run, and a run that is stopped and resumed."""

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEEDED = ("accelerate", "safetensors", "sklearn", "yaml", "psutil")
# This replaces progress bars alone, so that the recipe runs on a machine without rich.
STAND_IN = """\
import sys
from unittest.mock import MagicMock
for name in ("box", "console", "progress", "table"):
    sys.modules[f"rich.{name}"] = MagicMock()
"""


def train(flags, env, budget):
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), *flags]
    start = time.perf_counter()
    done = subprocess.run(  # noqa: S603 - this Python
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=max(1.0, budget.left), check=False
    )
    if done.returncode:
        said = [text for text in done.stderr.splitlines() if text.strip()] or ["no output"]
        raise RuntimeError(f"train.py ended with {done.returncode}: {said[-1]}")
    return time.perf_counter() - start


def apart(left, right):
    """Return the largest relative difference of two logs; infinite if their keys or lines differ."""
    if [line.keys() for line in left] != [line.keys() for line in right]:
        return float("inf")
    pairs = [(a[key], b[key]) for a, b in zip(left, right, strict=True) for key in a]
    if any((a is None) != (b is None) for a, b in pairs):
        return float("inf")
    return max(abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in pairs if a is not None)


def run(device, small, budget, part):
    """Run this part."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        part.skipped("train.py", f"not installed: {', '.join(missing)}")
        return
    steps = 40 if small else 400
    flags = ["--regularizer", "complexity", "--weight", "0.016", "--label_noise", "0.4", "--steps", str(steps)]
    flags += ["--no-figure", *(["--cpu"] if device == "cpu" else [])]
    if small:
        flags += ["--sketch_dim", "8", "--probe_size", "100", "--kernel_size", "10", "--log_spacing", "2"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # cuBLAS needs this to reproduce results bit for bit.
        env = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        if find_spec("rich") is None:
            (folder / "stand_in" / "rich").mkdir(parents=True)
            (folder / "stand_in" / "rich" / "__init__.py").write_text(STAND_IN)
            env["PYTHONPATH"] = os.pathsep.join([str(folder / "stand_in"), env.get("PYTHONPATH", "")])
        try:
            whole = train([*flags, "--output_dir", str(folder / "whole")], env, budget)
            log = (folder / "whole" / "metrics.jsonl").read_text()
            last = json.loads(log.splitlines()[-1])
            wanted = {key: value for key, value in last.items() if isinstance(value, float)}
            part.row(run="unbroken", steps=steps, seconds=whole, **dict(list(wanted.items())[:6]))
            if not budget.allows(2 * whole):
                part.skipped("resumed run", "no time left")
                return
            first = train([*flags, "--max_steps", str(steps // 2), "--output_dir", str(folder / "broken")], env, budget)
            more = ["--max_steps", "0", "--resume_from_checkpoint", str(folder / "broken"), "--no-figure"]
            second = train(more, env, budget)
        except subprocess.TimeoutExpired:
            part.skipped("train.py", "no time left")
            return
        again = (folder / "broken" / "metrics.jsonl").read_text()
        part.row(run="stopped and resumed", steps=steps, seconds=first + second, same_bytes=str(again == log))
        error = apart(*([json.loads(line) for line in text.splitlines()] for text in (log, again)))
        # On a GPU, sums over threads may run in another order.
        part.check("a resumed run has the log of an unbroken one", error, 0.0 if device == "cpu" else 1e-4)
