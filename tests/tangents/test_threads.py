"""Threads that measure at the same time: models of their own, and one model."""

import sys
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from loss_cases import make
from small_networks import X, gradients, mlp, normalized, trace_of
from torch import nn
from torch.nn.utils import parametrize

from alignreg import TangentFeatures
from alignreg.losses import AlignmentLoss
from alignreg.metrics import TangentAlignment, TangentTrace
from alignreg.tangents.switches import eager


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.rnn, self.head = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.rnn(self.layer(x))[0].mean(1))


def _switches():
    return (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.mkldnn.enabled,
        parametrize._cache_enabled,
        len(warnings.filters),
    )


@pytest.mark.parametrize("rounds", [6, pytest.param(200, marks=pytest.mark.thorough)])
def test_threads_measure_models_of_their_own(rounds):
    def job(seed):
        torch.manual_seed(0)
        model = Attending().double()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + seed / 10)
        x = torch.randn(4, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        metric = TangentAlignment(model, 3, sketch_dim=3)
        reg = AlignmentLoss(model, weight=1.0, every_n_steps=1, examples=None, probes=4)
        y = torch.tensor([0, 1, 2, 0])

        def once():
            metric.reset()
            metric.update(x, y)
            reg.step.zero_()
            value = reg(x, y)
            return float(metric.compute()), float(value.detach()), *(float(g.norm()) for g in gradients(model, value))

        return once

    jobs = [job(seed) for seed in range(4)]
    expected = [once() for once in jobs]
    before = _switches()
    wrong, drawn, errors, done = [], [], [], threading.Event()

    def measure(index):
        try:
            for _ in range(rounds):
                found = jobs[index]()
                if found != pytest.approx(expected[index], rel=1e-9):
                    wrong.append((index, found))
        except Exception as error:  # noqa: BLE001 - of whatever kind, in a thread
            errors.append(error)

    def draw():
        while not done.is_set():
            drawn.append(float(torch.rand((), dtype=torch.float64)))

    threads = [threading.Thread(target=measure, args=(index,)) for index in range(4)]
    other = threading.Thread(target=draw)
    for thread in (*threads, other):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    other.join()
    assert not errors
    assert not wrong
    assert len(set(drawn)) == len(drawn)
    assert _switches() == before


def test_threads_measure_one_model_one_after_the_other():
    model = normalized().append(nn.Dropout(0.5)).train()
    before = [{**module.__dict__} for module in model.modules()]
    buffers = [id(buffer) for buffer in model.buffers()]

    def measure(_=None):
        reg = make("complexity", model, weight=1.0)
        return float(TangentFeatures(model).trace(X)), float(reg(X).detach())

    expected = measure()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(measure, range(16)))
    for values in found:
        assert values == pytest.approx(expected, rel=1e-12)
    for module, attributes in zip(model.modules(), before, strict=True):
        assert all(module.__dict__[name] is value for name, value in attributes.items())
    assert [id(buffer) for buffer in model.buffers()] == buffers


def test_the_compiler_may_be_half_imported_by_another_thread(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo", types.ModuleType("torch._dynamo"))
    assert eager(lambda value: value + 1)(1) == 2


def test_a_metric_in_a_forward_hook_measures_the_model_that_runs():
    model = mlp().train()
    metric, busy = TangentTrace(model, 3, centered=False, method="exact"), threading.Lock()

    def measure(_, inputs, output):
        if busy.acquire(blocking=False):
            metric.update(inputs[0])
            busy.release()

    model.register_forward_hook(measure)
    model(X).sum().backward()
    assert float(metric.compute()) == pytest.approx(trace_of(mlp()), rel=1e-9)
    assert all(module.training for module in model.modules())
    assert all(p.grad is not None for p in model.parameters())
