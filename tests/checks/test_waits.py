"""How often a step of a loss, or an update, waits for the device."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from devices import CUDA
from loss_cases import LOSSES
from metric_rows import NUMBERS
from torch import nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from alignreg.checks import deferred
from alignreg.metrics import TangentAlignment
from alignreg.tangents.finite import NonFiniteOutputError

DEVICES = ["cpu", CUDA]


class Reads:
    """Counts how often numbers are read from a tensor, besides random states."""

    def __init__(self):
        self.count = 0

    @contextmanager
    def counting(self):
        """Count inside the block."""
        reads = self

        class Dispatched(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
                    reads.note(args[0])
                return func(*args, **(kwargs or {}))

        class Called(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if func in (torch.Tensor.tolist, torch.Tensor.numpy):  # of the CPU's tensors, nothing is dispatched
                    reads.note(args[0])
                return func(*args, **(kwargs or {}))

        with Dispatched(), Called():
            yield self

    def note(self, tensor):
        """Count one."""
        self.count += tensor.dtype != torch.uint8


@contextmanager
def waits(device):
    """Count into a list the waits for the device inside the block."""
    found = []
    if device == "cpu":
        with Reads().counting() as reads:
            yield found
        found += [None] * reads.count
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield found
        found += [one for one in said if "synchronizing CUDA operation" in str(one.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def _asynchronous(monkeypatch):
    """Treat the CPU as a device that is waited for."""
    monkeypatch.setattr(deferred, "waits", lambda device: device.type != "meta")


def network(device):
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
    )
    return nn.Sequential(*layers).to(device)


def batch(device):
    return torch.randn(12, 1, 6, 6, device=device), torch.arange(12, device=device) % 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_of_a_loss_waits_once_and_one_without_it_not_at_all(kind, device):
    model, (x, y) = network(device), batch(device)
    if not LOSSES[kind].probes:
        model[1] = nn.GroupNorm(2, 4).to(device)  # its kernel by rows of a Jacobian reads their sums
    reg = LOSSES[kind].kind(model, weight=1e-3, examples=8, every_n_steps=2)
    counts = []
    for _ in range(6):
        with waits(device) as found:
            (cross_entropy(model(x), y) + reg(x, y)).backward()
        counts.append(len(found))
    # The first finds out how many outputs there are, and whether self-checks hold.
    assert counts[1:] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"groups": 2}], ids=["all", "groups"])
@pytest.mark.parametrize("kind", NUMBERS)
def test_an_update_does_not_wait(kind, options, device):
    (x, y), group = batch(device), {"group": torch.arange(12, device="cpu") % 2} if options else {}
    metric = kind(network(device), 3, sketch_dim=4, **options).to(device)
    counts = []
    for _ in range(3):
        with waits(device) as found:
            metric.update(x, y, **group)
        counts.append(len(found))
    # Groups on the CPU are looked at there, in each update.
    assert counts[1] == counts[2] <= 2 * bool(options) if device == "cpu" else counts[1:] == [0, 0]


def test_a_batch_that_fails_a_check_later_is_left_out_and_told_of():
    model, (x, y) = network("cpu"), batch("cpu")
    metric, expected = (TangentAlignment(model, 3, sketch_dim=4) for _ in range(2))
    for some in (x, x * torch.nan, x):
        metric.update(some, y)
    metric.update(x, y + 1)
    for _ in range(2):
        expected.update(x, y)
    with pytest.warns(UserWarning, match="A batch was left out"), pytest.raises(NonFiniteOutputError):
        metric.compute()
    with (
        pytest.warns(UserWarning, match="A batch was left out"),
        pytest.raises(ValueError, match=r"in \[0, 3\), got 3"),
    ):
        metric.standard_error()
    assert metric.compute() == expected.compute()


def test_a_step_that_somebody_writes_is_read_again():
    """In place, by load_state_dict, in a copy, or by another tensor in its place: the draws are those of the step."""
    reg = LOSSES["complexity"].kind(network("cpu"), weight=1e-3, every_n_steps=1)
    x, _ = batch("cpu")
    values, states = [], []
    for _ in range(4):
        states.append({name: value.clone() for name, value in reg.state_dict().items()})
        values.append(float(reg(x).detach()))
    assert len(set(values)) == 4
    reg.load_state_dict(states[1])
    assert float(reg(x).detach()) == values[1]
    reg.step.fill_(3)
    assert float(reg(x).detach()) == values[3]
    reg.step = torch.tensor(1)
    assert float(reg(x).detach()) == values[1]
    other = copy.deepcopy(reg)
    assert float(other(x).detach()) == values[2]
    reg.step.zero_()
    assert [float(one(x).detach()) for one in (reg, other)] == [values[0], values[3]]
    before = reg.step
    reg._apply(torch.clone)  # as .to(device) does
    assert reg.step is not before
    assert float(reg(x).detach()) == values[1]


def test_weights_that_change_are_told_of_later():
    model, (x, y) = network("cpu"), batch("cpu")
    metric = TangentAlignment(model, 3, sketch_dim=4)
    metric.update(x, y)
    with torch.no_grad():
        model[4].weight[2, 3] += 1
    metric.update(x, y)
    with pytest.warns(UserWarning, match="weights changed between updates"):
        metric.compute()


def test_a_check_that_no_longer_holds_brings_the_other_way():
    proven = {"kind"}
    scope = deferred.Deferred()
    with deferred.deferred(scope):
        assert deferred.passes(torch.tensor(False), "kind", proven)
    with pytest.raises(deferred.SelfCheckError):
        scope.settle()
    assert proven == set()
    assert not deferred.passes(torch.tensor(False), "kind", proven)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_says_later_what_it_says_at_once(kind):
    model, (x, y) = network("cpu"), batch("cpu")
    reg = LOSSES[kind].kind(model, weight=1e-3, every_n_steps=1, seed=1)
    with pytest.raises(NonFiniteOutputError):
        reg(x * torch.nan, y)
    if LOSSES[kind].labeled:
        with pytest.warns(UserWarning, match="same target"):
            assert float(reg(x, torch.ones_like(y))) == 0
        with pytest.raises(ValueError, match=r"in \[0, 3\), got 3"):
            reg(x, y + 1)
    assert int(reg.step) == (3 if LOSSES[kind].labeled else 1)
