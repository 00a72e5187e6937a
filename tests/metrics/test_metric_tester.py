"""Every metric and every property of a metric of torchmetrics: on one process, and on two."""

import json

import pytest
from devices import CUDA
from metric_rows import METRICS
from metric_tester import PROPERTIES, SHARES, MetricTester, digits
from ranks import run_two


@pytest.fixture(scope="module")
def two_ranks(request, tmp_path_factory):
    """What two processes found of the rows that were selected."""
    here = [item for item in request.session.items if "two_ranks" in item.fixturenames and item.path == request.path]
    rows = list(dict.fromkeys(item.callspec.params["name"] for item in here))
    return run_two("metric_tester.py", tmp_path_factory.mktemp("ranks"), json.dumps(rows))


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
@pytest.mark.parametrize("wanted", PROPERTIES)
@pytest.mark.parametrize("name", METRICS)
def test_one_process(name, wanted):
    getattr(MetricTester(METRICS[name]), f"check_{wanted}")()


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("name", METRICS)
def test_device(name, device):
    MetricTester(METRICS[name], device=device).check_device()


@pytest.mark.parametrize("wanted", PROPERTIES)
@pytest.mark.parametrize("name", METRICS)
def test_two_processes(two_ranks, name, wanted):
    for found in two_ranks:
        assert found[f"{name}/{wanted}"] == "right"


@pytest.mark.parametrize("name", METRICS)
def test_uneven_shares_of_digits(two_ranks, name):
    """1000 and 797 examples, or all and none, in the same batches as on one rank."""
    expected = digits(METRICS[name], range(18))
    worst = 0.0
    for share in SHARES:
        for found in two_ranks:
            values = found[f"{name}/digits/{share}"]
            assert values == pytest.approx(expected, rel=1e-10, nan_ok=True)
            worst = max(worst, *(abs(a / b - 1) for a, b in zip(values, expected, strict=True) if b == b and b))
    print(f"{name}: largest relative difference between two ranks and one {worst:.1e}")
