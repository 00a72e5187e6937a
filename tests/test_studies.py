"""Studies: several runs of train.py, their figure, and what their numbers say."""

import importlib
import json
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch
from recipe_runs import RECIPES, TINY, read, run
from safetensors.torch import load_file
from test_recipes_alike import STUDIES


@pytest.fixture(autouse=True)
def _recipes_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))


def study_of(name):
    module = importlib.import_module(name)
    (kind,) = (value for value in vars(module).values() if isinstance(value, type) and value.__module__ == name)
    return kind()


@pytest.fixture(scope="module")
def one_run_of_each(tmp_path_factory):
    """A short run of the first setting of each study."""
    folders = {}
    sys.path.insert(0, str(RECIPES))
    for name in STUDIES:
        study = study_of(name)
        folder = tmp_path_factory.mktemp(name) / "run"
        flags = [*next(iter(study.flags_by_label(configured=False).values())).split(), *TINY.split()]
        # Data as the setting wants them.
        del flags[flags.index("--train_size", len(flags) - TINY.count(" ") - 1) :][:2]
        result = run(*flags, "--train_size", 900, "--output_dir", folder)
        assert result.returncode == 0, result.stderr
        folders[name] = folder
    sys.path.remove(str(RECIPES))
    return folders


@pytest.mark.parametrize("name", STUDIES)
def test_figure_and_findings_from_logs_alone(name, one_run_of_each, tmp_path, monkeypatch):
    study = study_of(name)
    runs = {label: [] for label in study.settings}
    for index, label in enumerate(study.settings):
        for seed in range(2):
            folder = shutil.copytree(one_run_of_each[name], tmp_path / f"{index}-{seed}")
            log = folder / "metrics.jsonl"
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            for line in lines:  # seeds differ
                line.update({key: v * (1 + 0.1 * seed) for key, v in line.items() if key != "step" and v is not None})
            log.write_text("".join(json.dumps(line) + "\n" for line in lines))
            runs[label].append(folder)
    figure = tmp_path / "figure.png"
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_: pytest.fail("a figure computes nothing"))
    study.draw(runs, figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    sentences = study.findings(runs)
    assert sentences
    assert all(sentence.endswith(".") for sentence in sentences)
    assert "±" in sentences[0]
    assert "nan" not in " ".join(sentences)


@pytest.mark.parametrize("name", STUDIES)
def test_a_configuration_takes_the_place_of_bundled_flags(name):
    study = study_of(name)
    own = {label: set(flags.split()) for label, flags in study.flags_by_label(configured=True).items()}
    assert own
    for flags in own.values():
        assert set(study.always.split()) <= flags
        assert not {flag for flag in study.bundled.split() if flag.startswith("--")} & flags - {"--depth", "--hidden"}


def test_a_study_from_its_command_and_on(tmp_path):
    folder = tmp_path / "study"
    command = [sys.executable, str(RECIPES / "spectrum.py"), "--seeds", "1", *TINY.split(), "--hidden", "8"]
    result = subprocess.run([*command, "--output_dir", folder], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "3 of 3 runs to do" in result.stdout
    assert "effective rank" in (folder / "findings.txt").read_text()
    assert {path.name for path in folder.iterdir()} == {
        "figure.png",
        "findings.txt",
        "study.json",
        "no-random-labels",
        "20---random-labels",
        "50---random-labels",
    }
    logs = {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")}
    assert len(logs) == 3
    # A run that was killed before it was done.
    (folder / "no-random-labels" / "seed-0" / "figure.png").unlink()
    result = subprocess.run([*command, "--resume", folder], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "1 of 3 runs to do" in result.stdout
    assert {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")} == logs
    for flags, message in (
        (["--output_dir", folder], "holds something"),
        (["--resume", tmp_path], "expected the folder of a study"),
    ):
        result = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert message in result.stderr
    other = [*command[:-1], "9", "--resume", folder]
    result = subprocess.run(other, capture_output=True, text=True, check=False)
    assert "expected the further flags of the study that goes on" in result.stderr
    bad = [*command[:-1], "x", "--output_dir", tmp_path / "bad"]
    result = subprocess.run(bad, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "invalid int value: 'x'" in result.stderr
    assert not (tmp_path / "bad").exists()


def test_a_study_that_is_stopped(tmp_path):
    """Its runs stop with it, and it goes on by its folder alone."""
    folder = tmp_path / "study"
    flags = [*TINY.split(), "--steps", "400", "--checkpointing_steps", "5"]
    command = [sys.executable, str(RECIPES / "spectrum.py"), "--seeds", "1", "--output_dir", str(folder), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(folder.glob("*/seed-0/checkpoints/step_*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"stopped\ngo on with --resume {folder}" in said
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    seen = {path: path.read_text() for path in folder.rglob("metrics.jsonl")}
    command = [sys.executable, str(RECIPES / "spectrum.py"), "--resume", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for path, log in seen.items():
        assert path.read_text().startswith(log)


def test_quantities_are_what_they_say(tmp_path):
    """Eigenfunctions continue the eigenvectors, layers sum to the kernel's rank measures, groups have their own."""
    names = "plane,layers,spectrum,groups,ranks"
    flags = f"--dataset disk --label_noise 0.3 --measure {names} --kernel_size 20"
    result = run("--output_dir", tmp_path / "run", *flags.split())
    assert result.returncode == 0, result.stderr
    log = read(tmp_path / "run")
    for line in log:
        assert line["train/largest_eigenvalue"] == pytest.approx(line["train/eigenvalue_1"])
        assert line["train/trace_ratio_1"] < line["train/trace_ratio_10"] <= line["train/trace_ratio_40"] <= 1 + 1e-12
        assert {key for key in line if key.startswith("layer/")} == {"layer/1", "layer/3", "layer/5"}
        plane = load_file(tmp_path / "run" / f"plane-{line['step']}.safetensors")
        assert plane["eigenfunctions"].shape == (41 * 41, 10)
        assert (plane["eigenvalues"][:-1] >= plane["eigenvalues"][1:]).all()
        assert plane["input_gradient"].shape == plane["tangent_norm"].shape == (41 * 41,)
        ratio = plane["eigenvalues"][19] / plane["eigenvalues"][0]
        assert line["plane/ratio_20"] == pytest.approx(float(ratio))
    assert log[0]["easy/alignment"] != log[0]["difficult/alignment"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--measure groups", "expected 10 easy and as many difficult examples for groups, got fewer difficult ones"),
        ("--measure plane", "expected points of the plane for plane"),
    ],
)
def test_quantities_that_the_data_do_not_have(flags, message, tmp_path):
    result = run("--output_dir", tmp_path / "run", *flags.split())
    assert result.returncode == 1
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()
