"""How recipes are started, and what the environment, the launcher or a file of flags brings along."""

import importlib
import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from paths import RECIPES, ROOT
from recipe_runs import TINY, module, parse, read, recipe, refused

pytestmark = pytest.mark.usefixtures("recipes_in_this_process")
PLAIN = [*TINY.split(), "--measure=", "--no-figure"]


def test_batches_that_a_launcher_accumulates_are_refused(tmp_path, monkeypatch):
    """Accelerate would divide the loss, and the recipe step each time."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    said = refused("train", monkeypatch, *PLAIN, "--output_dir", tmp_path / "run")
    assert "got gradient_accumulation_steps 4" in said
    assert "Unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in said
    assert not (tmp_path / "run").exists()


def test_deepspeed_is_refused(monkeypatch):
    from accelerate.utils import DistributedType

    accelerator = type("", (), {"gradient_accumulation_steps": 1, "distributed_type": DistributedType.DEEPSPEED})
    with pytest.raises(ValueError, match=r"--config_file: expected .* got DEEPSPEED"):
        module("training.processes").refuse_other_training(accelerator, "no")


def test_half_precision_that_would_be_left_out(tmp_path, monkeypatch):
    said = refused("train", monkeypatch, *PLAIN, "--mixed_precision", "fp16", "--output_dir", tmp_path / "run")
    assert "--mixed_precision: expected no or bf16 on the CPU, got fp16" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("launched", "flag", "warned"),
    [("bf16", "no", True), ("bf16", "bf16", False), ("no", "bf16", False), ("no", "no", False)],
)
def test_the_launchers_precision_is_overruled_aloud(launched, flag, warned, monkeypatch, capsys):
    """``accelerate launch`` always sets the variable, to "no" if nobody chose."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    config, _ = parse([*PLAIN, "--mixed_precision", flag, "--steps", "0"])
    module("training.loop").prepare(config)
    said = f"--mixed_precision {flag}, the recipe's own flag, overrides the launcher's {launched}"
    assert (said in capsys.readouterr().err) == warned


def test_as_a_module(monkeypatch):
    """``python -m recipes.train``, and so launchers' ``-m``."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *(place for place in sys.path if place != str(RECIPES))])
    for name in ("recipes", "recipes.train", "training", "training.loop"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert importlib.import_module("recipes.train").main


def test_make_in_a_folder_with_a_space(tmp_path):
    """With a Python in one, too. pip splits PIP_CONSTRAINT at spaces, as the shell does here."""
    make, folder = shutil.which("make"), tmp_path / "a b"
    if make is None:
        pytest.skip("no make")
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    python = folder / "my python"
    work = 'if [ "$2" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi; grep -c torch== $PIP_CONSTRAINT'
    python.write_text(f'#!/bin/sh\nset -e\n{work}\necho "$@"\n')
    python.chmod(0o755)
    command = [make, "--no-print-directory", ".venv/installed", f"PYTHON={python}"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    called = [line for line in result.stdout.splitlines() if line.startswith(("1", "-m"))]
    assert called == ["1", "-m venv .venv", "1", "-m pip install --quiet -e .[recipes,dev]"]


def test_terminals_without_our_signs(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with module("training.messages").in_words():
        print("accuracy ± s.e.")
    terminal.flush()
    assert terminal.buffer.getvalue() == b"accuracy ? s.e.\n"


def test_text_files_are_utf8_whatever_the_locale():
    for path in RECIPES.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for call in ("read_text(", "write_text("):
            for after in text.split(f".{call}")[1:]:
                assert "encoding=" in after.split("\n")[0], path


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    """A run that draws nothing does without; one that would is refused before it begins, as studies are."""
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "training.plots", raising=False)
    recipe("train", monkeypatch, *PLAIN, "--output_dir", tmp_path / "run")
    assert len(read(tmp_path / "run")) == 3
    with pytest.raises(SystemExit):
        parse(TINY.split())
    assert "--figure: expected the package matplotlib" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["spectrum.py", "--output_dir", str(tmp_path / "study")])
    for name in ("studies.study", "studies.spectrum"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit, match="expected the package matplotlib, to draw with"):
        module("studies.study").main(module("studies.spectrum").STUDY, None)
    assert not (tmp_path / "study").exists()


def bomb():
    """Nine times nine times ... values, and pairs, by aliases."""
    lines = ["a: &a [1, 1]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join(lines)


FILES = {
    "integer.yaml": (
        f"hidden: {10**400}",
        "--hidden: expected a number between 0 and 1000000000, got a number of more",
    ),
    "hexadecimal.yaml": (f"lr: {hex(10**5000)}", "--lr: expected a number of at least 0, got a number of more than 50"),
    "steps.yaml": (f"steps: {10**30}", f"--steps: expected a number between 0 and {2**63 - 1}, got {10**30}"),
    "brackets.yaml": ("lr: " + "[" * 5000, "with one plain value for each flag, got more in line 1 of"),
    "brackets.json": ("[" * 100_000, "got another kind of file"),
    "bomb.yaml": (bomb(), "got more in line 1 of"),
    "alias.yaml": ("lr: &a 1\nsteps: *a", "got more in line 2 of"),
    "merge.yaml": ("<<: {lr: 1}\nsteps: 3", "got more in line 1 of"),
    "list.json": (
        json.dumps({"config": {"lr": [[0] * 9999] * 99}}),
        "--lr: expected float, got [[0, 0, 0, 0, 0, 0, ...], [0",
    ),
    "text.yaml": ("lr: " + "x" * 10**6, "--lr: expected float, got 'xxx"),
    "flags.yaml": ("\n".join(f"{'y' * 99}{i}: 1" for i in range(999)), "does not know: yyyy"),
    "zero.yaml": (
        'data_path: "a\\0b"\ndataset: mnist',
        "--data_path: expected text without zero bytes, got 'a\\x00b'",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_flags_that_cannot_be_meant(name, tmp_path, capsys):
    text, message = FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match="2"):
        parse(["--config", str(tmp_path / name)])
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in said
    assert len(said) < 700


@pytest.mark.parametrize("hidden", [50_000_000, 10**9])
def test_networks_that_fit_nowhere(hidden, tmp_path, monkeypatch):
    said = refused("train", monkeypatch, *PLAIN, "--hidden", hidden, "--depth", 4, "--output_dir", tmp_path / "run")
    assert "--hidden, --depth: expected a network that fits into the" in said
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_later(monkeypatch):
    """The allocator's own words, without those of where it is."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    expected = r"train\.py: error: expected sizes that fit into memory, but can't allocate .* Lower"
    with pytest.raises(SystemExit, match=expected), module("training.messages").in_words():
        torch.empty(2**55)
    with pytest.raises(RuntimeError, match="ours"), module("training.messages").in_words():
        raise RuntimeError("a fault of ours")


def test_sizes_are_those_of_the_networks():
    models = module("training.models")
    for name in models.WIDTHS:
        shape = (1, 8, 8)
        state = torch.get_rng_state()
        assert models.size(name, shape, 10, hidden=8) == sum(
            p.numel() for p in models.build(name, shape, 10, hidden=8).parameters()
        )
        torch.set_rng_state(state)
        models.size(name, shape, 10, hidden=8, init="kaiming")
        assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_draws_as_it_always_has():
    loop, data, x = module("training.loop"), module("data.examples"), torch.randn(4, 1, 8, 8)
    generator = torch.Generator().manual_seed(922_336 * 10**13 + 50_001)
    assert torch.equal(loop._augmented(x, 922_336, 5, 1), data.crop_and_flip(x, generator))
    draws = {loop._augmented(x, 2**32 - 1, step, 0).numpy().tobytes() for step in range(20)}
    assert len(draws) == 20
