"""The package's types reach its users."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
    assert complaints((ROOT / "tests" / "typed_user.py").read_text(), tmp_path).startswith("Success")
