"""Exact kernels of alignreg, torch.func and (if installed) NNGeometry, for growing numbers of examples."""

from importlib.util import find_spec

import exact_kernel
import torch
from _gpu_correct import difference, tf32
from _gpu_networks import NETWORKS, free_bytes, peak, problem, release, reset_peak, seconds, share_of_products

from alignreg import TangentFeatures

FIRST = {"GPT": 2, "MLP": 32}
"""The first number of examples; 8 for the other networks."""
TOLERANCE = 2e-3
MOST = 4096


def by_alignreg(model, x, room):  # noqa: ARG001 - the same signature as its neighbors
    features = TangentFeatures(model)
    return lambda: features.kernel(x)


def by_torch_func(model, x, room):
    """Contract Jacobians of blocks of examples, parameter by parameter, with two blocks in memory at a time."""
    rows = exact_kernel.rows(model)
    one = sum(p.numel() * p.element_size() for p in model.parameters()) * model(x[:1]).shape[1]
    # vmap and jacrev hold about two copies of what they return.
    size = max(1, min(len(x), int(0.8 * room / (4 * one))))

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


def by_nngeometry(model, x, room):  # noqa: ARG001
    run, c = exact_kernel.by_nngeometry(model, x), model(x[:1]).shape[1]
    return lambda: run().reshape(len(x), c, len(x), c)


METHODS = {"alignreg": by_alignreg, "torch.func": by_torch_func}
if find_spec("nngeometry"):
    METHODS["nngeometry"] = by_nngeometry


def grow(measure, first, budget, seconds):
    """Double the number of examples until the next measurement, at four times the time, would not finish in time.

    Args:
        measure: a function of the number of examples that returns the seconds of the whole measurement and of one
            kernel, or ``None`` to stop.
        first: the first number of examples.
        budget: the time for all measurements.
        seconds: the time for these measurements alone.
    """
    n, left = first, seconds
    while n <= MOST:
        found = measure(n)
        if found is None:
            return
        taken, one = found
        left -= taken
        if 9 * one > min(left, budget.left):  # one kernel to warm up, one to measure
            return
        n *= 2


def measured(network, method, size, device, part, kept):
    """Return a function that measures and records one number of examples, and keeps the first kernel."""

    def measure(n):
        total = 0.0
        row = {"network": network, "method": method, "n": n}
        try:
            model, x = problem(network, n, size, device)
            run = METHODS[method](model, x, free_bytes(device))
            before = reset_peak(device)

            def first():
                value = run()
                kept.setdefault((network, method), value.detach().cpu())

            total += seconds(first, device)  # to warm up
            times = []
            while len(times) < 3 and (not times or total < 5):
                times.append(seconds(run, device))
                total += times[-1]
            part.row(**row, seconds=min(times), memory_mib=max(0.0, peak(device) - before))
            kept[network, method, n] = min(times)
        except torch.OutOfMemoryError:
            part.row(**row, not_run="out of memory")
            return None
        except Exception as error:  # noqa: BLE001
            if method == "alignreg":
                part.failed(f"{network}, n = {n}", error)
            else:
                part.row(**row, not_run=f"{type(error).__name__}: {error}"[:150])
            return None
        finally:
            model = x = run = None
            release(device)
        return total, min(times)

    return measure


def compare(network, part, kept):
    """Compare the first kernels, and the times at the largest number that both methods reached, with ours."""
    for method in METHODS:
        if method == "alignreg" or (network, method) not in kept:
            continue
        error = difference(kept[network, method], kept[network, "alignreg"])
        part.check(f"{network}: {method}'s kernel is ours", error, TOLERANCE)
        both = [n for n in (2**k for k in range(20)) if {(network, m, n) for m in (method, "alignreg")} <= kept.keys()]
        if both:
            ratio = kept[network, method, both[-1]] / kept[network, "alignreg", both[-1]]
            part.row(network=network, method=f"{method} over alignreg", n=both[-1], ratio=ratio)


def tf32_row(network, n, size, device, part):
    """Measure with products rounded to TF32."""
    model, x = problem(network, n, size, device)
    run = by_alignreg(model, x, None)
    exact = run()
    with tf32(True):
        error = difference(run(), exact)
        taken = seconds(run, device)
    part.row(network=network, method="alignreg, TF32", n=n, seconds=taken, difference=error)


def shares(network, n, size, device, part):
    """Measure the share of the time that GEMMs and convolutions need."""
    for method, make in METHODS.items():
        model, x = problem(network, n, size, device)
        run = make(model, x, free_bytes(device))
        run()
        part.row(network=network, method=f"{method}, profiled", n=n, share_of_products=share_of_products(run, device))
        release(device)


def guarded(what, part, call):
    """Skip an extra measurement that fails."""
    try:
        call()
    except Exception as error:  # noqa: BLE001
        part.skipped(what, f"{type(error).__name__}: {error}"[:150])


def run(device, small, budget, part):
    """Run this part."""
    size, networks = "small" if small else "full", [name for name in NETWORKS if name != "Transformer"]
    largest = {}
    with tf32(False):
        for place, network in enumerate(networks):
            kept = {}
            for left, method in enumerate(METHODS):
                rest = (len(networks) - place) * len(METHODS) - left
                share = 0.75 * budget.left / rest
                if small:
                    share = min(share, 3.0)
                grow(measured(network, method, size, device, part, kept), FIRST.get(network, 8), budget, share)
            guarded(f"{network}: comparison", part, lambda network=network, kept=kept: compare(network, part, kept))
            # The largest number that needs at most a second.
            ns = [key[2] for key, value in kept.items() if len(key) == 3 and key[1] == "alignreg" and value < 1]
            largest[network] = max(ns, default=FIRST.get(network, 8))
        for network, n in largest.items():
            here = (network, n, size, device, part)
            if device == "cuda" and budget.allows(6):
                guarded(f"{network} in TF32", part, lambda here=here: tf32_row(*here))
        for network in networks:
            here = (network, FIRST.get(network, 8), size, device, part)
            if budget.allows(6):
                guarded(f"{network} profiled", part, lambda here=here: shares(*here))
