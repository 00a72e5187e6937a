"""Memory that does not grow with the number of examples, and stays under the working limit."""

import subprocess
import sys

import pytest

# Peak resident memory is a property of a process: each measurement runs in its own.
STREAM = """
import resource, sys, torch
from sklearn.datasets import load_digits
from alignreg.metrics import TangentAlignment
torch.manual_seed(0)
x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x / 16, dtype=torch.float32)[: int(sys.argv[1])], torch.tensor(y)[: int(sys.argv[1])]
net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
metric = TangentAlignment(net, 10)
for a, b in zip(x.split(100), y.split(100)):
    metric.update(a, b)
metric.compute()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

KERNEL = """
import resource, sys, torch
from alignreg import TangentFeatures
torch.manual_seed(0)
from torch.nn import Linear, ReLU, Sequential
net = Sequential(Linear(64, 1200), ReLU(), Linear(1200, 1200), ReLU(), Linear(1200, 10))
x = torch.randn(int(sys.argv[1]), 64)
net(x).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
TangentFeatures(net).kernel(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def peak_kib(code, n):
    return int(subprocess.run([sys.executable, "-c", code, str(n)], capture_output=True, check=True).stdout)


def test_streaming_memory_does_not_grow():
    few, many = peak_kib(STREAM, 200), peak_kib(STREAM, 1797)
    print(f"peak memory: 200 digits {few / 1024:.0f} MiB, 1797 digits {many / 1024:.0f} MiB, ratio {many / few:.3f}")
    assert many == pytest.approx(few, rel=0.1)


def test_kernel_stays_within_working_memory():
    """Φ alone would take 50·10·1.53 M numbers, 2.9 GiB."""
    peak = peak_kib(KERNEL, 50) / 1024**2
    print(f"working memory of the kernel: {peak:.2f} GiB")
    assert peak < 2
