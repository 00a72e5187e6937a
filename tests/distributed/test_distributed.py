"""Two gloo processes against one."""

import pytest
from distributed_worker import PROBE_SETS, replica, walk
from metric_rows import METRICS, feed, numbers, problem
from ranks import run_two

from alignreg.metrics import TangentAlignment


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_two("distributed_worker.py", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", PROBE_SETS)
def test_ranks_keep_what_one_process_would(two_ranks, name):
    """Of examples that ranks see in turn."""
    _, x, y, _ = problem(110)
    expected = numbers(feed(METRICS[name].make(replica(), max_examples=30), x, y, size=110).compute())
    for found in two_ranks:
        assert found[f"{name}/in turn"] == pytest.approx(expected, rel=1e-10)


def test_constant_total_loses_nothing(two_ranks):
    model, x, y, _ = problem(110)
    value = float(feed(TangentAlignment(model, 3, sketch_dim=16), x, y, size=20).compute())
    for found in two_ranks:
        assert "constant" in found["constant"]
        assert found["after constant"] == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("each_step", [False, True])
@pytest.mark.parametrize("share", ["even", "uneven", "empty", "now and then"])
def test_path_of_two_ranks_is_that_of_one(two_ranks, share, each_step):
    metric, _ = walk(0, "whole", each_step)
    value, traces = float(metric.compute()), metric.history().traces.tolist()
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
