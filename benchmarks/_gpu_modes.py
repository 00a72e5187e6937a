"""Training steps in GPU-specific modes: whatever the mode of the task, the gradient of the loss stays the same.

Each check subtracts the gradient of a step of the task alone from that of a step of task and loss, and compares the
difference with the gradient of the loss in a plain step.
"""

import contextlib
import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch
from _gpu_networks import labels, problem
from torch import distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from alignreg import TangentFeatures
from alignreg.losses import AlignmentLoss, ComplexityPenalty, KARELoss, ParticipationRatioLoss
from alignreg.metrics import TangentAlignment, TangentTrace

N, C = 12, 4
LOSSES = (ComplexityPenalty, AlignmentLoss, ParticipationRatioLoss, KARELoss)
QUICK = {"ResNet18": LOSSES[:3]}
"""Other networks use all losses; with batch statistics KARE needs the rows of the whole Jacobian."""
TOLERANCE = 2e-3
"""For float32; the difference of two steps has the rounding error of both."""


def loss_of(kind, model, device, **options):
    # The weight is large enough to stand out from the rounding error of the task.
    return kind(model, weight=100.0, examples=None, every_n_steps=1, clip=None, **options).to(device)


def flat(model):
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    whole = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]  # shards
    return torch.cat([grad.detach().double().flatten().cpu() for grad in whole])


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def alone(kind, model, x, y):
    """Return the gradient of the loss in a plain step."""
    model.zero_grad()
    loss_of(kind, model, x.device.type)(x, y).backward()
    return flat(model)


def made(name, device):
    model, x = problem(name, N, "tiny", device, c=C)
    return model.train(), x, labels(N, device, C)


def worst(name, device, step, *, prepare=lambda model, x: (model, x)):
    """Return the largest error over losses; ``step(model, x, y, reg)`` computes the gradients of a training step."""
    model, x, y = made(name, device)
    errors = []
    for kind in QUICK.get(name, LOSSES):
        expected = alone(kind, model, x, y)
        inner, inputs = prepare(model, x)
        for reg in (None, loss_of(kind, inner, device)):
            model.zero_grad()
            step(inner, inputs, y, reg)
            if reg is None:
                before = flat(model)
        errors.append(relative(flat(model) - before, expected))
    return max(errors), TOLERANCE


def plain(model, x, y, reg):
    loss = cross_entropy(model(x).float(), y)
    if reg is not None:
        loss = loss + reg(x, y)
    loss.backward()


def scaled(device, dtype):
    """Return a step under autocast, including the loss, with a gradient scaler."""

    def step(model, x, y, reg):
        scaler = torch.amp.GradScaler(device, init_scale=2.0**8, enabled=dtype == torch.float16)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        with torch.autocast(device, dtype):
            loss = cross_entropy(model(x), y)
            if reg is not None:
                loss = loss + reg(x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    return step


def attention(device, backend):
    """Return a step that requests an attention kernel for the forward pass and the loss."""

    def step(model, x, y, reg):
        # On a GPU the flash kernel accepts half precision alone.
        half = device == "cuda" and backend == SDPBackend.FLASH_ATTENTION
        with sdpa_kernel(backend), torch.autocast(device, torch.bfloat16, enabled=half):
            plain(model, x, y, reg)

    return step


def channels_last(name, device):
    def prepare(model, x):
        return model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)

    model, x, _ = made(name, device)
    model.eval()
    expected = TangentFeatures(model).kernel(x)
    found = TangentFeatures(prepare(model, x)[0]).kernel(x.to(memory_format=torch.channels_last))
    error, tolerance = worst(name, device, plain, prepare=prepare)
    return max(error, relative(found.double(), expected.double())), tolerance


def backend_of(device):
    """Return inductor if its compiler is available."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return "inductor" if device == "cuda" and compiler else "aot_eager"


def compiled(device, *, whole):
    def step(model, x, y, reg):
        if whole:
            torch.compile(plain, backend=backend_of(device))(model, x, y, reg)
        else:
            plain(model, x, y, reg)

    def prepare(model, x):
        return (model if whole else torch.compile(model, backend=backend_of(device))), x

    torch._dynamo.reset()  # noqa: SLF001 - there is no public reset
    try:
        return worst("MLP", device, step, prepare=prepare)
    finally:
        torch._dynamo.reset()  # noqa: SLF001


def cuda_graph(device):
    """Check the loss outside a captured and replayed step of the task, before and after the capture."""
    if device != "cuda":
        return "CUDA alone"
    model, x, y = made("MLP", device)
    errors = []
    for kind in LOSSES:
        expected = alone(kind, model, x, y)
        reg = loss_of(kind, model, device)
        reg(x, y).backward()
        reg.step.zero_()  # so that the same probes are drawn again
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model.zero_grad(set_to_none=True)
                plain(model, x, y, None)
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plain(model, x, y, None)
        graph.replay()
        before = flat(model)
        reg(x, y).backward()
        errors.append(relative(flat(model) - before, expected))
    return max(errors), TOLERANCE


@contextlib.contextmanager
def one_process(device):
    """Run the block in a process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device == "cuda" else "gloo"
        if device == "cuda":
            torch.cuda.set_device(0)
        dist.init_process_group(backend, init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def distributed(device, *, sync):
    """Check the losses under DDP."""
    with one_process(device):
        model, x, y = made("ResNet18", device)
        errors = []
        for kind in QUICK["ResNet18"]:
            expected = alone(kind, model, x, y)
            wrapped = DistributedDataParallel(model)
            reg = loss_of(kind, wrapped, device, sync=sync)
            model.zero_grad()
            plain(wrapped, x, y, None)
            before = flat(model)
            model.zero_grad()
            plain(wrapped, x, y, reg)
            errors.append(relative(flat(model) - before, expected))
        return max(errors), TOLERANCE


def sharded(device):
    """Check the losses under fully_shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with one_process(device):
        mesh = init_device_mesh(device, (1,))
        errors = []
        for kind in LOSSES:
            model, x, y = made("MLP", device)
            expected = alone(kind, model, x, y)
            model.zero_grad(set_to_none=True)
            fully_shard(model, mesh=mesh)
            plain(model, x, y, None)
            before = flat(model)
            model.zero_grad()
            plain(model, x, y, loss_of(kind, model, device))
            errors.append(relative(flat(model) - before, expected))
        return max(errors), TOLERANCE


def synced_metrics(device):
    """Check metrics that sum over ranks."""
    model, x, y = made("MLP", device)
    values = []
    for group in (contextlib.nullcontext(), one_process(device)):
        with group:
            for make in (TangentAlignment, partial(TangentAlignment, method="exact"), TangentTrace):
                metric = make(model, C).to(device)
                metric.update(x, y)
                values.append(float(metric.compute()))
    half = len(values) // 2
    return max(abs(a / b - 1) for a, b in zip(values[half:], values[:half], strict=True)), 1e-6


def default_device(device):
    """Check a model on the CPU while another default device is set."""
    model, x, y = made("MLP", "cpu")
    expected = TangentFeatures(model).kernel(x)
    grads = alone(AlignmentLoss, model, x, y)
    torch.set_default_device(device)
    try:
        found, again = TangentFeatures(model).kernel(x), alone(AlignmentLoss, model, x, y)
    finally:
        torch.set_default_device(None)
    return max(relative(found.double(), expected.double()), relative(again, grads)), 1e-6


def checks(device):
    """Return all checks by name; each returns error and tolerance, or the reason why it does not apply."""
    group = "NCCL" if device == "cuda" else "gloo"
    efficient = SDPBackend.EFFICIENT_ATTENTION if device == "cuda" else SDPBackend.MATH
    return {
        "plain step": lambda: worst("ResNet18", device, plain),
        "autocast, bfloat16": lambda: worst("ResNet18", device, scaled(device, torch.bfloat16)),
        "autocast, float16, GradScaler": lambda: worst("ResNet18", device, scaled(device, torch.float16)),
        "autocast of a Transformer, bfloat16": lambda: worst("GPT", device, scaled(device, torch.bfloat16)),
        "flash attention": lambda: worst("GPT", device, attention(device, SDPBackend.FLASH_ATTENTION)),
        f"attention kernel {efficient.name}": lambda: worst("GPT", device, attention(device, efficient)),
        "channels_last, ResNet18": lambda: channels_last("ResNet18", device),
        "channels_last, VGG11": lambda: channels_last("VGG11", device),
        "CUDA graph of the task's step": lambda: cuda_graph(device),
        "default device": lambda: default_device(device),
        f"DDP, {group}": lambda: distributed(device, sync=False),
        f"DDP, {group}, sync=True": lambda: distributed(device, sync=True),
        f"fully_shard, {group}": lambda: sharded(device),
        f"metrics over ranks, {group}": lambda: synced_metrics(device),
    }


def compilations(device):
    """Return the slow checks, in the format of :func:`checks`."""
    backend = backend_of(device)
    return {
        f"compiled model, {backend}": lambda: compiled(device, whole=False),
        f"compiled step, {backend}": lambda: compiled(device, whole=True),
    }
