"""Networks for a run on a GPU, and functions that measure time and memory."""

import contextlib
import math
import re
import time
from pathlib import Path

import exact_kernel
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

C = 10


class Block(nn.Module):
    """A pre-norm block of a Transformer."""

    def __init__(self, width, heads, *, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x):
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """GPT-2 with 124 M parameters and tied embeddings; it returns the next-token logits of a few tokens."""

    def __init__(self, c, *, vocabulary=50257, width=768, layers=12, heads=12, positions=1024):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("candidates", torch.arange(c) * (vocabulary // c), persistent=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device)
        h = self.norm(self.blocks(self.tokens(x) + self.positions(places)))
        return self.head(h[:, -1])[:, self.candidates]


class ViT(nn.Module):
    """ViT-tiny: 12 layers of width 192 on 4x4 patches of a 32x32 image, with the mean over patches."""

    def __init__(self, c, *, width=192, layers=12, heads=3):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, c)

    def forward(self, x):
        h = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(h)).mean(1))


SIZES = {
    "MLP": {"tiny": 4, "small": 8, "full": 64},
    "VGG11": {"tiny": 2, "small": 4, "full": 64},
    "ResNet18": {"tiny": 2, "small": 4, "full": 64},
    "Transformer": {"tiny": 4, "small": 4, "full": 16},
}
BY_WIDTH = {"MLP": "mlp", "VGG11": "vgg", "ResNet18": "resnet", "Transformer": "transformer"}
TINY = {"layers": 2, "width": 32, "heads": 2}
TOKENS = {"tiny": 6, "small": 16, "full": 64}
NETWORKS = (*BY_WIDTH, "ViT", "GPT")


def smooth(model):
    """Replace activations that have a kink, whose slope can depend on how the device or dtype rounds its input."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size))
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation = silu
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def problem(name, n, size, device="cpu", c=C):
    """Return a network in evaluation mode and n inputs: "tiny" and smooth for checks, "small" for a CPU, "full"."""
    if name in BY_WIDTH:
        model, x = exact_kernel.problem(BY_WIDTH[name], n=n, c=c, width=SIZES[name][size], device=device)
        return (smooth(model) if size == "tiny" else model), x
    torch.manual_seed(0)
    options = {} if size == "full" else TINY
    if name == "ViT":
        return ViT(c, **options).eval().to(device), torch.randn(n, 3, 32, 32).to(device)
    vocabulary = 50257 if size == "full" else 100
    model = GPT(c, vocabulary=vocabulary, **options, **({} if size == "full" else {"positions": 16})).eval()
    return model.to(device), torch.randint(vocabulary, (n, TOKENS[size])).to(device)


def labels(n, device="cpu", c=C):
    return (torch.arange(n) % c).to(device)


def seconds(run, device):
    """Return the duration of a call, on a GPU between events and after all earlier work is done."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


def reset_peak(device):
    """Reset the peak of memory, and return the memory in use now, in MiB."""
    if device == "cpu":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**20


def peak(device):
    """Return the peak of memory since the reset, in MiB."""
    return _status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20


def _status(key):
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((int(text.split()[1]) / 1024 for text in lines if text.startswith(key)), math.nan)
    return math.nan


def release(device):
    if device == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device):
    """Return the bytes of memory that are free; for a CPU a fixed limit for these runs."""
    if device == "cpu":
        return 4 * 2**30
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def forward_backward(model, x, y):
    """Return a function that runs one pass of the task, the unit of cost."""

    def run():
        model.zero_grad()
        cross_entropy(model(x), y).backward()

    return run


# nvjet names cuBLAS on Hopper; xmma, cudnn, implicit, wgrad, dgrad and fprop name convolutions.
PRODUCTS = re.compile(r"gemm|gemv|cutlass|cublas|nvjet|xmma|cudnn|implicit|wgrad|dgrad|fprop|conv", re.IGNORECASE)
PRODUCTS_ON_CPU = re.compile(r"aten::(mm|addmm|bmm|baddbmm|addmv|mv|dot|.*conv.*)$")


def share_of_products(run, device):
    """Return the share of matrix products and convolutions in the busy time."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cpu = device == "cpu"
    with profile(activities=[ProfilerActivity.CPU if cpu else ProfilerActivity.CUDA]) as found:
        run()
        if not cpu:
            torch.cuda.synchronize()
    total = products = 0.0
    for event in found.key_averages():
        if not cpu and event.device_type != DeviceType.CUDA:
            continue
        taken = event.self_cpu_time_total if cpu else event.self_device_time_total
        total += taken
        products += taken if (PRODUCTS_ON_CPU if cpu else PRODUCTS).search(event.key) else 0.0
    return products / total if total else math.nan
