"""Two gloo processes against one."""

import pytest
import torch
from cases import build
from distributed_worker import PROBE_SETS, batch, probes, replica
from ranks import run_two
from torch.nn.functional import cross_entropy

from alignreg.metrics import PathComplexity, TangentAlignment


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_two("distributed_worker.py", tmp_path_factory.mktemp("ranks"))


def one_process(method, **options):
    model, _, _ = build("mlp")
    x = torch.randn(110, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(110) % 7 % 3
    metric = TangentAlignment(model.double(), 3, sketch_dim=16, method=method)
    for start in range(0, 110, 20):
        metric.update(x[start : start + 20], y[start : start + 20])
    return float(metric.compute()), float(metric.standard_error())


@pytest.mark.parametrize("share", ["even", "uneven", "empty"])
@pytest.mark.parametrize("method", ["sketch", "exact"])
def test_two_ranks_are_one(two_ranks, method, share):
    value, error = one_process(method)
    for found in two_ranks:
        assert found[f"{method}/{share}"] == pytest.approx([value, error], rel=1e-10)
        assert found[f"{method}/{share}/again"] == pytest.approx(error, rel=1e-10)
        if method == "exact":
            assert value == pytest.approx(found["oracle"], rel=1e-10)


@pytest.mark.parametrize("share", ["even", "uneven", "empty", "in turn"])
@pytest.mark.parametrize("kind", ["spectrum", "layers"])
def test_probe_sets_of_two_ranks_are_one(two_ranks, kind, share):
    x, y = probes()
    metric = PROBE_SETS[kind](replica(), max_examples=30 if share == "in turn" else 200)
    metric.update(x, y)
    expected = {name: float(value) for name, value in metric.compute().items()}
    for rank, found in enumerate(two_ranks):
        assert found[f"{kind}/{share}"] == pytest.approx(expected, rel=1e-10)
        if share != "in turn":  # after compute() each rank has its own examples again
            assert found[f"{kind}/{share}/kept"] == {"even": [3, 3], "uneven": [4, 2], "empty": [6, 0]}[share][rank]


def test_constant_total_loses_nothing(two_ranks):
    value, _ = one_process("sketch")
    for found in two_ranks:
        assert "constant" in found["constant"]
        assert found["after constant"] == pytest.approx(value, rel=1e-10)


def test_without_sync_each_rank_has_its_own(two_ranks):
    assert two_ranks[0]["alone"] != two_ranks[1]["alone"]


def one_path(each_step):
    torch.manual_seed(0)
    model = build("mlp")[0].double()
    metric = PathComplexity(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(7):
        probe, _ = batch(0, 50)
        metric.update(probe)
        x, y = batch(0, step)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        if each_step:
            metric.step()
    return float(metric.compute()), metric.history().traces.tolist()


@pytest.mark.parametrize("each_step", [False, True])
@pytest.mark.parametrize("share", ["even", "uneven", "empty", "now and then"])
def test_path_of_two_ranks_is_that_of_one(two_ranks, share, each_step):
    value, traces = one_path(each_step)
    for found in two_ranks:
        assert found[f"path/{share}/{each_step}"][0] == pytest.approx(value, rel=1e-10)
        assert found[f"path/{share}/{each_step}"][1] == pytest.approx(traces, rel=1e-10)
        assert found[f"path/{share}/{each_step}/again"] == found[f"path/{share}/{each_step}"][0]


def test_ranks_that_went_different_ways_are_refused(two_ranks):
    for found in two_ranks:
        assert "different weights" in found["path/parted"]


def test_sketches_of_sharded_models_are_those_of_whole_ones(two_ranks):
    for found in two_ranks:
        errors = {name: value for name, value in found.items() if name.startswith("sharded/") and name.count("/") == 2}
        assert len(errors) == 8
        print(errors)
        assert max(errors.values()) <= 1e-12
        assert len(found["sharded/changed"]) == 1
        assert found["sharded/moved"] > 1e-6
        assert len(found["sharded/refused"]) == 2
        assert all("sharded by fully_shard" in message for message in found["sharded/refused"])
