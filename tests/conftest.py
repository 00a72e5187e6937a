import signal

import pytest
import torch
from paths import RECIPES
from recipe_runs import forget


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def recipes_in_this_process(monkeypatch):
    """Files of recipes/ can be imported, and what a run leaves in the process is taken back."""
    monkeypatch.syspath_prepend(str(RECIPES))
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    forget()
