"""Check and measure alignreg on a GPU in one run.

    python benchmarks/gpu.py [--device cuda] [--limit 8] [--parts correct kernel] [--json benchmarks/gpu.json]
    python benchmarks/gpu.py --device cpu --small      every part on a CPU, at sizes that need minutes

correct  compares kernels, products, metrics and losses with the CPU in float64, in float64 and in float32 with TF32 off
         and on. It checks training steps under autocast with a GradScaler, fused attention kernels, channels_last,
         torch.compile, CUDA graphs and one NCCL process, and runs the tests that have a case for the device.
kernel   compares exact kernels with those of torch.func (vmap of jacrev, contracted by parameter, in blocks that fit)
         and of NNGeometry if it is installed: seconds, peak memory, and the share of matrix products in the time, for
         as many examples as time allows.
sketch   measures TangentAlignment.update in forward and backward passes of the same batch, with the number of
         directions at a time and peak memory.
losses   measures a training step with each loss relative to a plain one, for ResNet18 and the Transformer at batch 128,
         in float32 and bfloat16.
recipe   runs recipes/train.py on digits, once uninterrupted and once stopped and resumed, and compares the logs.

The run needs torch, torchmetrics, einops and scikit-learn, and for some parts pytest and accelerate. Each part runs in
a process of its own with a share of the time. A part starts nothing that would not finish in its share, and a part that
hangs or crashes does not affect the others. Rows are written to the json at once. The exit status is 1 if a check
failed or a part did not finish.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _gpu_record as record

HERE = Path(__file__).parent
ROOT = HERE.parent
PARTS = {"correct": 36, "kernel": 24, "sketch": 12, "losses": 12, "recipe": 16}
"""The parts with their shares of the time."""


def commit():
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()[:12]


def header(args):
    """Return the device, versions and commit of the results."""
    import torch

    cuda = args.device == "cuda"
    return {
        "device": torch.cuda.get_device_name(0) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": ".".join(map(str, sys.version_info[:3])),
        "commit": commit(),
        "sizes": "small" if args.small else "full",
    }


def run_part(name, args):
    """Run a part; this is the main function of its process."""
    sys.path.insert(0, str(ROOT))
    budget, part = record.Budget(args.deadline), record.Record(args.json, name)
    part.update(**header(args))
    importlib.import_module(f"_gpu_{name}").run(args.device, args.small, budget, part)


def run(args):
    """Run the parts one after another, and return those that failed."""
    end = time.time() + 60 * args.limit
    options = ["--device", args.device, "--json", str(args.json), *(["--small"] if args.small else [])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    for place, name in enumerate(args.parts):
        now = time.time()
        seconds = record.shares({part: PARTS[part] for part in args.parts[place:]}, end - now)[name]
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        part = record.Record(args.json, name)
        part.start()
        deadline = now + seconds - max(4.0, 0.1 * seconds)
        command = [sys.executable, str(HERE / "gpu.py"), "--job", name, "--deadline", str(deadline), *options]
        with tempfile.TemporaryDirectory() as folder:
            errors = Path(folder) / "errors"
            env["TORCHINDUCTOR_CACHE_DIR"] = folder
            status = record.in_process(command, seconds, errors, cwd=ROOT, env=env)
            if status != "done":
                print("".join(errors.read_text(errors="replace").splitlines(keepends=True)[-25:]), flush=True)
        part.update(status=f"{status} in {time.time() - now:.0f} s" if status == "done" else status)
    found = record.read(args.json)
    print("\n" + "\n".join(record.summary(found, args.parts)), flush=True)
    return [name for name in args.parts if record.is_failed(found[name])]


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks and few examples")
    parser.add_argument("--limit", type=float, help="minutes for all parts together (default: 8, or 5 with --small)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument(
        "--json", type=Path, help="output (default: benchmarks/gpu.json; runs/gpu.json for the CPU or --small)"
    )
    parser.add_argument("--job", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.limit = args.limit or (5.0 if args.small else 8.0)
    trial = args.small or args.device == "cpu"
    args.json = (args.json or (ROOT / "runs" if trial else HERE) / "gpu.json").absolute()
    args.parts = [part for part in PARTS if part in args.parts]
    return args


def main():
    args = parse()
    if args.job:
        run_part(args.job, args)
        return
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit("--device: expected a GPU that torch can use, got none. Try --device cpu --small.")
    failed = run(args)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
