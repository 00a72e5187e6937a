"""Two gloo processes against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import build

from alignreg.metrics import TangentAlignment

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(HERE / "distributed_worker.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store"), str(folder / "found")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    return [json.loads((folder / f"found.{rank}").read_text()) for rank in range(2)]


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


def test_constant_total_loses_nothing(two_ranks):
    value, _ = one_process("sketch")
    for found in two_ranks:
        assert "constant" in found["constant"]
        assert found["after constant"] == pytest.approx(value, rel=1e-10)


def test_without_sync_each_rank_has_its_own(two_ranks):
    assert two_ranks[0]["alone"] != two_ranks[1]["alone"]
