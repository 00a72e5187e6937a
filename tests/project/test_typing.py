"""The package's types reach its users."""

import inspect
import subprocess
import sys

import pytest
import torch
from paths import HELPERS, ROOT

from alignreg import losses, metrics

pytest.importorskip("mypy")


def complaints(program, folder):
    """What mypy --strict says of a program that finds the package on its path, as installed: by py.typed alone."""
    copy = folder / "program.py"  # beside the package, mypy would take its source without asking for py.typed
    copy.write_text(program)
    # The configuration and cache of `make check`, so that torch is read once.
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache", copy]
    command = [sys.executable, "-m", "mypy", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout


def test_a_program_of_the_public_names_is_strict(tmp_path):
    assert complaints((HELPERS / "typed_user.py").read_text(), tmp_path).startswith("Success")


PUBLIC = [
    kind
    for module in (metrics, losses)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, torch.nn.Module)
]
OWN_DEFAULTS = {"KARELoss": {"examples"}}


@pytest.mark.parametrize("kind", PUBLIC)
def test_options_are_spelled_out(kind):
    """And where a class hands them on, with the defaults of its base."""
    given = inspect.signature(kind).parameters
    assert [p.name for p in given.values() if p.kind is p.VAR_KEYWORD] in ([], ["metric_kwargs"])
    for base in kind.__mro__[1:]:
        if base.__module__.startswith("alignreg") and "__init__" in vars(base):
            inherited = inspect.signature(base.__init__).parameters
            for name in (given.keys() & inherited.keys()) - OWN_DEFAULTS.get(kind.__name__, set()):
                if inherited[name].default is not inspect.Parameter.empty:
                    assert given[name].default == inherited[name].default, name
    if issubclass(kind, losses.base.TangentLoss):
        assert len(given) >= 11
