"""recipes/supernat.py as a user runs it."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from paths import RECIPES
from ranks import PATIENCE
from recipe_runs import ASCII, load, read

TINY = "--noise_features 2 6 --seeds 2 --steps 30 --n 12 --n_validation 40 --d_signal 3 --lr 0.05 --noise 0.5"
METHODS = ["gd", "supernat-max", "supernat-0.05"]


def run(folder, *flags):
    command = [sys.executable, str(RECIPES / "supernat.py"), *TINY.split(), "--output_dir", str(folder), *flags]
    env = {**os.environ, **ASCII, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=PATIENCE, check=False)


def run_here(folder, flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["supernat.py", *TINY.split(), "--output_dir", str(folder), *flags.split()])
    load("supernat").main()


def test_files_keys_and_refusal(tmp_path):
    folder = tmp_path / "new" / "run"
    done = run(folder, "--gauge", "max", "0.05")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl", "figure.png"}
    log = read(folder)
    steps = sorted({line["step"] for line in log})
    assert steps[0] == 0
    assert steps[-1] == 30
    assert 10 < len(steps) < 25
    assert len(log) == 2 * 2 * len(steps)
    keys = ["noise_features", "seed", "step", "truth/validation_error"]
    keys += [f"{method}/{key}" for method in METHODS for key in ("train_error", "validation_error", "complexity")]
    for line in log:
        assert list(line) == keys
        assert all(math.isfinite(value) for value in line.values())
        if line["step"] == 1:  # all start with the same step
            assert line["gd/train_error"] == pytest.approx(line["supernat-max/train_error"], rel=1e-12)
    made = json.loads((folder / "config.json").read_text())
    assert made["config"]["gauge"] == ["max", 0.05]
    assert made["config"]["noise_features"] == [2, 6]
    for text in ("gradient descent", "SuperNat, gauge max", "SuperNat, gauge 0.05", "best step", "figure: "):
        assert text in done.stdout

    before = {path: path.read_bytes() for path in folder.iterdir()}
    again = run(folder)
    assert again.returncode == 1
    assert "supernat.py: error: --output_dir: expected a new or empty folder" in again.stderr
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "flags", ["--gauge min", "--gauge -1", "--seeds 0", "--lr nan", "--noise_features -1", "--steps x"]
)
def test_bad_flags_make_no_folder(flags, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        run_here(tmp_path / "run", flags, monkeypatch)
    assert not (tmp_path / "run").exists()


def test_data_are_those_of_the_header():
    recipe = load("supernat")
    config = {"n": 50, "n_validation": 20_000, "d_signal": 3, "noise": 0.5}
    x, y, truth = recipe.draw_data(4, 7, config)
    assert x.shape == (20_050, 7)
    fit = torch.linalg.lstsq(x, truth[:, None]).solution[:, 0]
    assert float(fit.norm()) == pytest.approx(1)
    assert fit[3:].abs().max() < 1e-12
    assert float((y - truth).std()) == pytest.approx(0.5, rel=0.03)
    assert float(x.std()) == pytest.approx(1, rel=0.03)
    for value, other in zip((x, y, truth), recipe.draw_data(4, 7, config), strict=True):
        assert torch.equal(value, other)
    assert not torch.equal(x, recipe.draw_data(4, 8, config)[0])


def test_one_seed_and_divergence(tmp_path, monkeypatch, capsys):
    run_here(tmp_path / "one", "--seeds 1", monkeypatch)
    assert "± 0.00" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"2 noise features, seed 0: step: .* Lower lr"):
        run_here(tmp_path / "wild", "--lr 1e200", monkeypatch)
