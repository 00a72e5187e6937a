"""Compare the two ways to features along random directions: from the gradients of layers, and in forward mode.

    python benchmarks/pushforward.py [--networks MLP ResNet] [--outputs 1 3 10 30] [--sizes 16 64]
                                     [--json benchmarks/pushforward.json]

The networks are in evaluation mode and float32, with random signs for directions, on one thread; the times are CPU time
of one call of each way, one after the other. ``right`` says whether the library chose the faster way, or one within a
tenth of it. ``difference`` is that of the results, relative to their norm.
"""

import argparse
import json
import time
from pathlib import Path
from unittest import mock

import exact_kernel
import torch
from _gpu_networks import GPT, ViT

from alignreg import TangentFeatures, sketches
from alignreg.tangents import pushforward

BATCH = {"MLP": 100, "VGG": 20, "ResNet": 10, "Transformer": 10, "ViT": 4, "GPT": 8}


def problem(name, c):
    torch.manual_seed(0)
    n = BATCH[name]
    if name == "ViT":
        return ViT(c, layers=4).eval(), torch.randn(n, 3, 32, 32)
    if name == "GPT":
        model = GPT(c, vocabulary=1000, width=128, layers=4, heads=4, positions=64)
        return model.eval(), torch.randint(1000, (n, 32))
    return exact_kernel.problem(name.lower(), n=n, c=c)


def measure(model, x, m, *, layers):
    features = TangentFeatures(model)
    outputs = mock.patch.object(pushforward, "FEW_OUTPUTS", 0 if layers else 10**9)
    with outputs, mock.patch.object(pushforward, "_layers_are_quicker", return_value=True):
        start = time.process_time()
        z = features.pushforward(x, sketches.rademacher(m, seed=0))
        return time.process_time() - start, z


def by_layers(model, x, m):
    """Return whether the library goes by layers."""
    with mock.patch.object(pushforward, "by_layers", side_effect=InterruptedError) as chosen:
        TangentFeatures(model).pushforward(x, sketches.rademacher(m, seed=0))
    return chosen.called


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument("--outputs", type=int, nargs="+", default=[1, 3, 10, 30])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.networks:
        for c in args.outputs:
            model, x = problem(name, c)
            for layers in (True, False):  # to begin with
                measure(model, x, 4, layers=layers)
            for m in args.sizes:
                layers, z = measure(model, x, m, layers=True)
                forward, other = measure(model, x, m, layers=False)
                chosen, best = layers if by_layers(model, x, m) else forward, min(layers, forward)
                row = {
                    "network": name,
                    "n": len(x),
                    "outputs": c,
                    "m": m,
                    "layers_seconds": layers,
                    "forward_seconds": forward,
                    "right": chosen < 1.1 * best,
                    "difference": float((z - other).norm() / other.norm()),
                }
                rows.append(row)
                print(
                    f"{name:12} n={len(x):<4} c={c:<4} m={m:<4} layers {layers:7.3f} s, forward mode {forward:7.3f} s "
                    f"({forward / layers:5.2f}x), {'right' if row['right'] else 'wrong'}, "
                    f"difference {row['difference']:.0e}",
                    flush=True,
                )
    print(f"chosen right: {sum(row['right'] for row in rows)} of {len(rows)}")
    args.json.write_text(json.dumps({"rows": rows, "torch": torch.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main()
