"""Every loss, every kind of model, every way of training: right, or a clear error."""

import pytest
from loss_cases import LOSSES
from loss_matrix import COLUMNS, ROWS, verdict
from ranks import run_two


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_two("loss_worker.py", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("column", [column for column in COLUMNS if column != "DDP"])
@pytest.mark.parametrize("name", ROWS)
def test_right(name, column):
    assert verdict(name, column) == dict.fromkeys(LOSSES, "right")
