"""Memory that does not grow with the number of examples, and stays under the working limit."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from cases import build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from alignreg import TangentFeatures, sketches
from alignreg.losses import AlignmentLoss
from alignreg.tangents import memory

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


CHECKPOINTED = """
import resource, sys, torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from alignreg.losses import ComplexityPenalty
torch.manual_seed(0)

class Block(nn.Module):
    gradient_checkpointing = True  # as transformers marks it, in training mode alone
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
    def forward(self, x):
        if self.gradient_checkpointing and self.training:
            return checkpoint(self.layer, x, use_reentrant=False)
        return self.layer(x)

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(100, 128), nn.Linear(128, 3)
        self.blocks = nn.Sequential(*[Block() for _ in range(8)])
    def forward(self, x):
        return self.head(self.blocks(self.embed(x)).mean(1))

net, x, y = Encoder(), torch.randint(100, (16, 128)), torch.arange(16) % 3
for p in net.parameters():
    p.grad = torch.zeros_like(p)
jobs = {
    "step": lambda: cross_entropy(net(x), y),
    "penalty": lambda: ComplexityPenalty(net)(x),
}
cross_entropy(net(x[:1]), y[:1]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
jobs[sys.argv[1]]().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def peak_kib(code, n):
    return int(subprocess.run([sys.executable, "-c", code, str(n)], capture_output=True, check=True).stdout)


def test_the_penalty_of_a_checkpointed_model_takes_no_more_than_two_steps():
    step, penalty = (peak_kib(CHECKPOINTED, job) / 1024 for job in ("step", "penalty"))
    print(f"memory above the process: checkpointed step {step:.0f} MiB, penalty {penalty:.0f} MiB")
    assert penalty <= 2 * step


def test_streaming_memory_does_not_grow():
    few, many = peak_kib(STREAM, 200), peak_kib(STREAM, 1797)
    print(f"peak memory: 200 digits {few / 1024:.0f} MiB, 1797 digits {many / 1024:.0f} MiB, ratio {many / few:.3f}")
    assert many == pytest.approx(few, rel=0.1)


def test_kernel_stays_within_working_memory():
    """Φ alone would take 50·10·1.53 M numbers, 2.9 GiB."""
    peak = peak_kib(KERNEL, 50) / 1024**2
    print(f"working memory of the kernel: {peak:.2f} GiB")
    assert peak < 2


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive together."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self._known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                weakref.finalize(storage, self._forget, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return result

    def _forget(self, nbytes):
        self.now -= nbytes


def test_losses_in_micro_batches_hold_their_pullbacks_twice():
    """Those of all examples and those of some; beside them no other m·P numbers."""
    model = nn.Sequential(nn.Linear(8, 60), nn.Tanh(), *[nn.Linear(60, 60) for _ in range(8)], nn.Linear(60, 3))
    pullbacks = 33 * 4 * sum(p.numel() for p in model.parameters())
    x, y = torch.randn(8, 8), torch.arange(8) % 3
    reg = AlignmentLoss(model, examples=None, every_n_steps=1, probes=32, micro_batch_size=4)
    with Peak() as peak:
        reg(x, y)
    print(f"{peak.most / pullbacks:.2f} times the pullbacks")
    assert peak.most < 2.5 * pullbacks


METHODS = {
    "outputs": lambda features, x: features.outputs(x),
    "jacobian": lambda features, x: features.jacobian(x),
    "kernel": lambda features, x: features.kernel(x),
    "kernel of two batches": lambda features, x: features.kernel(x, x),
    "kernel with a graph": lambda features, x: features.kernel(x, create_graph=True),
    "diagonal": lambda features, x: features.diagonal(x),
    "trace": lambda features, x: features.trace(x),
    "pushforward": lambda features, x: features.pushforward(x, sketches.gaussian(2, seed=0)),
    "pushforward with a graph": lambda features, x: features.pushforward(
        x, sketches.gaussian(2, seed=0), create_graph=True
    ),
    "pullback": lambda features, x: features.pullback(x, torch.ones(2, len(x), 3)),
    "pullback with a graph": lambda features, x: features.pullback(x, torch.ones(2, len(x), 3), create_graph=True),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["mlp", "resnet, batchnorm", "embedding, layernorm, attention"])
def test_nothing_inside_the_model_outlives_a_call(kind, method):
    """Activations and what autograd keeps of them are gone with the result."""
    if kind.startswith("embedding"):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model = nn.Sequential(nn.Embedding(7, 8), layer, nn.Flatten(), nn.Linear(32, 3))
        x = torch.randint(7, (5, 4))
    else:
        model, x, _ = build(kind)
        x = x[:5]
    seen = []

    def watch(module, args, output):
        if isinstance(output, torch.Tensor):
            seen.append(weakref.ref(output))

    for module in model.modules():
        module.register_forward_hook(watch)
    METHODS[method](TangentFeatures(model), x)
    gc.collect()
    assert seen
    assert not any(reference() is not None for reference in seen)


@pytest.mark.parametrize(
    ("free", "reserved", "allocated", "expected"),
    [(40, 0, 0, 16), (30, 12, 2, 16), (70, 8, 8, 32), (7, 0, 0, 2), (0, 0, 0, 0)],
)
def test_working_memory_of_a_gpu(monkeypatch, free, reserved, allocated, expected):
    """Half of what the driver and torch's allocator have free, down to a power of two."""
    gpu, seen = torch.device("cuda", 1), []
    for name, value in {
        "mem_get_info": (free * 2**30, 80 * 2**30),
        "memory_reserved": reserved * 2**30,
        "memory_allocated": allocated * 2**30,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: seen.append(device) or value)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert memory.budget(gpu) == max(1, expected * 2**30)
    assert seen == [gpu] * 3
    assert memory.budget(gpu, alike=True) == memory.budget(torch.device("cpu")) == memory.WORKING_MEMORY


def test_chunks_follow_the_working_memory(monkeypatch):
    """Directions go through the model as many at a time as fit, and more where there is more room; the value stays."""
    model, x = nn.Linear(100, 10), torch.randn(5, 100)
    sizes, block = [], sketches.RandomDirections.block

    def noted(self, name, like, start, stop):
        sizes.append(stop - start)
        return block(self, name, like, start, stop)

    monkeypatch.setattr(sketches.RandomDirections, "block", noted)
    values, most = [], []
    for budget in (1, 60_000, 2**30):
        monkeypatch.setattr(memory, "budget", lambda device, alike, budget=budget: budget)
        sizes.clear()
        values.append(TangentFeatures(model).pushforward(x, sketches.gaussian(16, seed=0)))
        most.append(max(sizes))
    assert most == [1, 2, 16]
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(values[2], values[0])
