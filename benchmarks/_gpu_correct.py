"""Checks of values on the device against the CPU in float64, and of training steps in GPU-specific modes."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import _gpu_modes
import torch
from _gpu_networks import NETWORKS, labels, problem

from alignreg import TangentFeatures, functional, sketches
from alignreg.losses import AlignmentLoss, ComplexityPenalty, KARELoss, ParticipationRatioLoss
from alignreg.metrics import (
    LayerwiseAlignment,
    PathComplexity,
    TangentAlignment,
    TangentParticipationRatio,
    TangentSpectrum,
    TangentTrace,
    records,
)
from alignreg.sketches import random

LOSSES = {
    "complexity": ComplexityPenalty,
    "alignment": AlignmentLoss,
    "participation ratio": ParticipationRatioLoss,
    "kare": KARELoss,
}
N, OUTPUTS, M = 12, 4, 8
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Tolerances of ‖found − exact‖/‖exact‖, for smooth networks."""
TF32 = 5e-2
ROOT = Path(__file__).parent.parent


def difference(found, exact):
    """Return ‖found − exact‖ / ‖exact‖, computed in float64 on the CPU."""
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    return float((found - exact).norm() / exact.norm().clamp_min(1e-300))


@contextlib.contextmanager
def same_draws():
    """Give the device the random numbers of the CPU, and order examples alike in all dtypes.

    CPU and device draw different numbers from the same seed, and examples are ordered by their bytes.
    """
    fill, in_bytes = random.fill, records._bytes  # noqa: SLF001

    def drawn_on_the_cpu(values, distribution, key):
        drawn = torch.empty(values.shape, dtype=values.dtype, device="cpu")
        fill(drawn, distribution, key)
        values.copy_(drawn)

    def of_numbers(values):
        return in_bytes(values.double() if values.is_floating_point() else values)

    with mock.patch.object(random, "fill", drawn_on_the_cpu), mock.patch.object(records, "_bytes", of_numbers):
        yield


@contextlib.contextmanager
def tf32(on):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def flat(tensors):
    return torch.cat([t.detach().double().flatten().cpu() for t in tensors])


def products(model, x, y):  # noqa: ARG001 - the same signature as its neighbors
    """Yield the names and values of the kernel and of products with the features."""
    features = TangentFeatures(model)
    directions = sketches.gaussian(3, seed=1)
    yield "kernel", features.kernel(x)
    yield "kernel by layer", flat(features.kernel(x, per_layer=True).values())
    yield "kernel of two batches", features.kernel(x[:4], x[4:])
    yield "trace", features.trace(x)
    yield "pushforward", features.pushforward(x, directions)
    outputs = sketches.probes(2, len(x), OUTPUTS, seed=2, like=torch.empty(0, dtype=torch.float64))
    like = next(iter(features.parameters.values()))
    yield "pullback", flat(features.pullback(x, outputs.to(like)).values())
    yield "spectrum", functional.spectrum(features.kernel(x))


def measures(model, x, y):
    """Yield the names and values of the metrics."""
    made = {
        "TangentAlignment": TangentAlignment(model, OUTPUTS, sketch_dim=M),
        "TangentAlignment exact": TangentAlignment(model, OUTPUTS, method="exact"),
        "TangentAlignment factored": TangentAlignment(model, OUTPUTS, sketch_dim=M, sketch="factored"),
        "TangentTrace": TangentTrace(model, OUTPUTS, sketch_dim=M),
        "TangentParticipationRatio": TangentParticipationRatio(model, OUTPUTS, sketch_dim=M),
        "LayerwiseAlignment": LayerwiseAlignment(model, OUTPUTS),
        "LayerwiseAlignment sketch": LayerwiseAlignment(model, OUTPUTS, method="sketch", probes=M),
    }
    for name, metric in ((name, metric.to(x.device)) for name, metric in made.items()):
        for part in (slice(0, 8), slice(8, None)):
            metric.update(x[part], y[part])
        value = metric.compute()
        yield name, flat(value.values()) if isinstance(value, dict) else value
    spectrum = TangentSpectrum(model, OUTPUTS, k=4).to(x.device)
    spectrum.update(x, y)
    yield "TangentSpectrum", flat(value for value in spectrum.compute().values() if value.numel())
    path = PathComplexity(model).to(x.device)
    path.update(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    path.update(x)
    yield "PathComplexity", path.compute()
    with torch.no_grad():
        for p in model.parameters():
            p.div_(1.01)


def gradients(model, x, y):
    """Yield the names and values of each loss and of its gradient."""
    for name, loss in LOSSES.items():
        reg = loss(model, weight=1.0, examples=None, every_n_steps=1, clip=None).to(x.device)
        model.zero_grad()
        value = reg(x, y)
        value.backward()
        yield name, value
        yield f"gradient of {name}", flat(p.grad for p in model.parameters() if p.grad is not None)
    model.zero_grad()


KINDS = {"products": products, "metrics": measures, "losses": gradients}


def values(kind, name, device, dtype):
    model, x = problem(name, N, "tiny", c=OUTPUTS)
    model = model.to(device, dtype)
    x = x.to(device, dtype) if x.is_floating_point() else x.to(device)
    with same_draws():
        return dict(KINDS[kind](model, x, labels(N, device, OUTPUTS)))


def compare(found, exact, tolerance, part, name):
    """Record the quantity with the largest error."""
    errors = {key: difference(found[key], exact[key]) for key in exact}
    worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
    part.check(name, errors[worst], tolerance, note=f"worst of {len(errors)}: {worst}")


def numbers(device, budget, part):
    """Check all networks and dtypes against the CPU in float64."""
    modes = [("float64", torch.float64, False), ("float32", torch.float32, False)]
    if device == "cuda":
        modes.append(("float32, TF32", torch.float32, True))
    longest = 0.0
    for name in (name for name in NETWORKS if name != "ViT"):  # GPT has the same blocks
        for kind in KINDS:
            start = time.perf_counter()
            if not budget.allows(1.5 * longest + 1):
                part.skipped(f"{name}, {kind}", "no time left")
                continue
            exact = values(kind, name, "cpu", torch.float64)
            for mode, dtype, on in modes:
                if device == "cpu" and dtype == torch.float64:
                    continue
                title = f"{name}, {kind}, {mode}"
                try:
                    with tf32(on):
                        found = values(kind, name, device, dtype)
                    compare(found, exact, TF32 if on else TOLERANCES[dtype], part, title)
                except Exception as error:  # noqa: BLE001 - one check that raises is a finding
                    part.failed(title, error)
            longest = max(longest, time.perf_counter() - start)


def modes(checks, budget, part):
    """Check the modes of training; each check returns its error and its tolerance."""
    for name, check in checks.items():
        if not budget.allows(10):
            part.skipped(name, "no time left")
            continue
        try:
            with tf32(False):
                found = check()
        except Exception as error:  # noqa: BLE001
            part.failed(name, error)
        else:
            if isinstance(found, str):
                part.skipped(name, found)
            else:
                part.check(name, *found)


def files():
    """Return the test files that have a case for CUDA and do not need the recipes."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    mine = [path for path in found if "cuda" in path.read_text().lower()]
    return [path for path in mine if path.parent.name not in ("recipes", "benchmarks")]


def tests(device, budget, part):
    """Run the tests of the suite that are for this device."""
    if not budget.allows(20):
        part.skipped("tests", "no time left")
        return
    selected = "cuda and not on_cpu" if device == "cuda" else "test_devices and cpu"
    command = [sys.executable, "-m", "pytest", *map(str, files()), "-k", selected, "-o", "addopts=", "-q", "-rfE"]
    command += ["--tb=line", "--no-header", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(  # noqa: S603 - this Python
            command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=budget.left, check=False
        )
    except subprocess.TimeoutExpired as late:
        part.skipped("tests", f"stopped after {late.timeout:.0f} s")
        return
    print(done.stdout[-3000:], done.stderr[-1000:])
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    if done.returncode not in (0, 1) or not counts.get("passed"):
        said = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        part.failed("tests", RuntimeError(f"pytest ended with {done.returncode}: {said[-1]}"))
        return
    broken = re.findall(r"^(?:FAILED|ERROR) (\S+.*)$", done.stdout, re.MULTILINE)
    told = ", ".join(f"{count} {word}" for word, count in counts.items())
    wrong = counts.get("failed", 0) + counts.get("error", 0)
    part.check(f"tests -k '{selected}'", float(wrong), 0.0, note="; ".join([told, *broken])[:1500])


def run(device, small, budget, part):  # noqa: ARG001 - this part is always small
    """Run this part."""
    later = 0.4 * budget.left
    modes(_gpu_modes.checks(device), budget, part)
    numbers(device, type(budget)(budget.deadline - later), part)
    tests(device, budget, part)
    modes(_gpu_modes.compilations(device), budget, part)
