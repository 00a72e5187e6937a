"""Check that gradients stay finite over 5,000 steps with each loss at ten times its default weight.

    python benchmarks/loss_stability.py [--steps 5000] [--threads 1] [--device cpu] [--json FILE]

An MLP 64-64-64-10 is trained on digits by SGD with learning rate 0.05 and momentum 0.9 on batches of 64, in float32 and
with the task under bf16 autocast. Every 20th batch holds one class alone. Nothing is clipped. The rows show the number
of steps with a gradient that is not finite, the largest norm of a gradient, the number of batches that left a loss
undefined, and the final accuracy.
"""

import argparse
import json
import warnings
from pathlib import Path

import torch
from rich.progress import track
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from alignreg.losses import AlignmentLoss, ComplexityPenalty, KARELoss, ParticipationRatioLoss

LOSSES = (ComplexityPenalty, AlignmentLoss, ParticipationRatioLoss, KARELoss)


def run(kind, args, *, autocast):
    inputs, labels = (torch.as_tensor(array, device=args.device) for array in load_digits(return_X_y=True))
    inputs = inputs.float() / 16
    torch.manual_seed(0)
    sizes = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    net = nn.Sequential(*sizes).to(args.device)
    reg = kind(net, weight=10 * kind.default_weight).to(args.device)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9)
    not_finite = undefined = 0
    largest = 0.0
    for step in track(range(args.steps), description=kind.__name__):
        one_class = step % 20 == 0
        rows = (labels == step // 20 % 10).nonzero()[:64, 0] if one_class else torch.randint(len(labels), (64,))
        optimizer.zero_grad()
        with torch.autocast(args.device, torch.bfloat16, enabled=autocast):
            task = cross_entropy(net(inputs[rows]), labels[rows])
        extra = reg(inputs[rows], labels[rows])
        undefined += step % reg.every_n_steps == 0 and float(extra.detach()) == 0
        (task + extra).backward()
        norm = nn.utils.get_total_norm([p.grad for p in net.parameters()])
        not_finite += not bool(torch.isfinite(norm))
        largest = max(largest, float(norm))
        optimizer.step()
    accuracy = float((net(inputs).argmax(1) == labels).float().mean())
    return {
        "loss": kind.__name__,
        "precision": "bf16 autocast" if autocast else "float32",
        "steps": args.steps,
        "not_finite": int(not_finite),
        "undefined": int(undefined),
        "largest_norm": largest,
        "accuracy": accuracy,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for kind in LOSSES:
        for autocast in (False, True):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="All examples of a batch have the same target")
                rows.append(run(kind, args, autocast=autocast))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    args.json.write_text(json.dumps({"torch": torch.__version__, "device": args.device, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
