"""Exact kernels: ours, torch.func's, and NNGeometry's where it can be imported, for more and more examples."""

from importlib.util import find_spec

import exact_kernel
import torch
from _gpu_correct import difference, tf32
from _gpu_networks import NETWORKS, free_bytes, peak, problem, release, reset_peak, seconds, share_of_products

from alignreg import TangentFeatures

FIRST = {"GPT": 2, "MLP": 32}
"""How many examples to begin with; 8 otherwise."""
TOLERANCE = 2e-3
MOST = 4096


def by_alignreg(model, x, device):
    features = TangentFeatures(model)
    return lambda: features.kernel(x)


def by_alignreg_tf32(model, x, device):
    features = TangentFeatures(model)

    def run():
        with tf32(True):
            return features.kernel(x)

    return run


def by_torch_func(model, x, device):
    """Jacobians of blocks of examples, contracted parameter by parameter: two blocks are in memory at a time."""
    rows = exact_kernel.rows(model)
    one = sum(p.numel() * p.element_size() for p in model.parameters()) * model(x[:1]).shape[1]
    # vmap and jacrev hold about two copies of what they return.
    size = max(1, min(len(x), int(0.8 * free_bytes(device) / (4 * one))))

    def run():
        blocks = x.split(size)
        c, n = None, len(x)
        for i, left in enumerate(blocks):
            J = {name: value.flatten(2) for name, value in rows(left).items()}
            if c is None:
                c = next(iter(J.values())).shape[1]
                K = x.new_zeros(n, c, n, c, dtype=next(iter(J.values())).dtype)
            for j, right in enumerate(blocks[: i + 1]):
                other = J if i == j else {name: value.flatten(2) for name, value in rows(right).items()}
                part = sum((J[name].flatten(0, 1) @ other[name].flatten(0, 1).T) for name in J)
                part = part.reshape(len(left), c, len(right), c)
                a, b = i * size, j * size
                K[a : a + len(left), :, b : b + len(right)] = part
                K[b : b + len(right), :, a : a + len(left)] = part.permute(2, 3, 0, 1)
        return K

    return run


def by_nngeometry(model, x, device):
    run = exact_kernel.by_nngeometry(model, x)
    return lambda: run().reshape(len(x), -1, len(x), run_outputs(model, x))


def run_outputs(model, x):
    return model(x[:1]).shape[1]


METHODS = {"alignreg": by_alignreg, "torch.func": by_torch_func}
if find_spec("nngeometry"):
    METHODS["nngeometry"] = by_nngeometry


def grow(measure, first, budget, seconds):
    """Measure twice as many each time, until the next, at four times the time, would not end.

    Args:
        measure: takes a number of examples; returns the seconds that all of it took, or ``None`` to stop.
        first: the first number.
        budget: of all.
        seconds: for these alone.
    """
    n, left = first, seconds
    while n <= MOST:
        taken = measure(n)
        if taken is None:
            return
        left -= taken
        if 4 * taken > min(left, budget.left):
            return
        n *= 2


def measured(network, method, size, device, part, kept):
    """Return a function that measures one number of examples, notes it, and keeps the first kernel."""

    def measure(n):
        total = 0.0
        try:
            model, x = problem(network, n, size, device)
            run = METHODS[method](model, x, device)
            before = reset_peak(device)
            total += seconds(lambda: kept.setdefault((network, method), run().detach().cpu()), device)  # to warm up
            times = []
            while len(times) < 3 and (not times or total < 5):
                times.append(seconds(run, device))
                total += times[-1]
            part.row(network=network, method=method, n=n, seconds=min(times), memory_mib=peak(device) - before)
        except torch.OutOfMemoryError:
            part.row(network=network, method=method, n=n, not_run="out of memory")
            return None
        except Exception as error:
            if method == "alignreg":
                raise
            part.row(network=network, method=method, n=n, not_run=f"{type(error).__name__}: {error}"[:150])
            return None
        finally:
            model = x = run = None
            release(device)
        return total

    return measure


def tf32_row(network, n, size, device, part):
    """The same with products rounded to TF32."""
    model, x = problem(network, n, size, device)
    exact, run = by_alignreg(model, x, device)(), by_alignreg_tf32(model, x, device)
    error = difference(run(), exact)
    part.row(network=network, method="alignreg, TF32", n=n, seconds=seconds(run, device), difference=error)


def shares(network, n, size, device, part):
    """Which part of the time GEMMs and convolutions take."""
    for method in METHODS:
        model, x = problem(network, n, size, device)
        run = METHODS[method](model, x, device)
        run()
        part.row(network=network, method=f"{method}, profiled", n=n, share_of_products=share_of_products(run, device))
        release(device)


def guarded(what, part, call):
    """Leave out what fails beside the measurements."""
    try:
        call()
    except Exception as error:  # noqa: BLE001
        part.skipped(what, f"{type(error).__name__}: {error}"[:150])


def run(device, small, budget, part):
    """Run this part."""
    size, kept, networks = "small" if small else "full", {}, [name for name in NETWORKS if name != "Transformer"]
    with tf32(False):
        for place, network in enumerate(networks):
            for left, method in enumerate(METHODS):
                rest = (len(networks) - place) * len(METHODS) - left
                share = 0.75 * budget.left / rest
                if small:
                    share = min(share, 6.0)
                first = FIRST.get(network, 8)
                grow(measured(network, method, size, device, part, kept), first, budget, share)
            ours = kept.pop((network, "alignreg"))
            for method in METHODS:
                if (network, method) in kept:
                    error = difference(kept.pop((network, method)), ours)
                    part.check(f"{network}: {method}'s kernel is ours", error, TOLERANCE)
        for network in networks:
            if device == "cuda" and budget.allows(5):
                n = FIRST.get(network, 8)
                guarded(f"{network} in TF32", part, lambda network=network, n=n: tf32_row(network, n, size, device, part))
            if budget.allows(5):
                n = FIRST.get(network, 8)
                guarded(f"{network} profiled", part, lambda network=network, n=n: shares(network, n, size, device, part))
