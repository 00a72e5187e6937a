"""One run on a GPU: is everything right there, and what does it cost?

    python benchmarks/gpu.py [--device cuda] [--limit 8] [--parts correct kernel] [--json benchmarks/gpu.json]
    python benchmarks/gpu.py --device cpu --small      every part on a CPU, at sizes that take minutes

correct  Kernels, products, metrics and losses against the CPU in float64: float64, and float32 with TF32 off and on.
         Steps of training under autocast with a GradScaler, the fused attention kernels, channels_last, torch.compile,
         CUDA graphs and one process of NCCL. The tests that have a case for the device.
kernel   Exact kernels against torch.func's (vmap of jacrev, contracted by parameter, in blocks that fit) and
         NNGeometry's where it is installed: seconds, peak memory, and which part of the time products of matrices take,
         for as many examples as time allows.
sketch   TangentAlignment.update in forward and backward passes of the same batch; directions at a time; peak memory.
losses   A step of training with each loss over a plain one: ResNet18 and the Transformer at batch 128, float32 and
         bfloat16.
recipe   recipes/train.py on digits, unbroken, and stopped and resumed: the same log.

Needs torch, torchmetrics, einops, scikit-learn; pytest and accelerate where the parts want them. Each part runs in a
process of its own and has its share of the time: nothing is begun that would not end in it, and what hangs or crashes
takes nothing else along. Rows are in the json as soon as they are known. The exit status is 1 if a check failed or a
part came to no proper end.
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
"""The parts and their shares of the time."""


def commit():
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()[:12]


def header(args):
    """Return what the numbers were made with."""
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
    """In a process of its own."""
    sys.path.insert(0, str(ROOT))
    budget, part = record.Budget(args.deadline), record.Record(args.json, name)
    part.update(**header(args))
    importlib.import_module(f"_gpu_{name}").run(args.device, args.small, budget, part)


def run(args):
    """Run the parts one after the other, and return those that went wrong."""
    end = time.time() + 60 * args.limit
    options = ["--device", args.device, "--json", str(args.json), *(["--small"] if args.small else [])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    for place, name in enumerate(args.parts):
        now = time.time()
        seconds = record.shares({part: PARTS[part] for part in args.parts[place:]}, end - now)[name]
        print(f"{name}: {seconds:.0f} s at most", flush=True)
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
    parser.add_argument("--limit", type=float, help="minutes for all parts together; 8, and 5 with --small")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--json", type=Path, help="benchmarks/gpu.json; of a CPU, or --small, runs/gpu.json")
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
        sys.exit(f"went wrong: {', '.join(failed)}")


if __name__ == "__main__":
    main()
