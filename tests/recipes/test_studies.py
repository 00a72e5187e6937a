"""Studies: several runs of train.py, their figure, and what their numbers say."""

import copy
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
import types

import oracles
import psutil
import pytest
import torch
from paths import RECIPES
from ranks import PATIENCE
from recipe_runs import ASCII, STUDIES, TINY, forget, parse, run
from safetensors.torch import load_file
from torch import nn

pytestmark = pytest.mark.usefixtures("recipes_in_this_process")


def study_of(name):
    return importlib.import_module(f"studies.{name}").STUDY


@pytest.fixture(scope="module")
def one_run_of_each(tmp_path_factory):
    """A short run of the first setting of each study."""
    folders = {}
    sys.path.insert(0, str(RECIPES))
    for name in STUDIES:
        study = study_of(name)
        folder = tmp_path_factory.mktemp(name) / "run"
        settings = next(iter(study.by_label(configured=False).values()))
        config, _ = parse([*TINY.split(), "--train_size", "900"], settings=settings)  # data as the setting wants them
        assert importlib.import_module("studies.jobs")._train(folder, config) is None
        folders[name] = folder
    sys.path.remove(str(RECIPES))
    forget()
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
    importlib.import_module("training.plots").save(study.draw(runs), figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    sentences = study.findings(runs)
    assert sentences
    assert all(sentence.endswith(".") for sentence in sentences)
    assert "±" in sentences[0]
    assert "nan" not in " ".join(sentences)


@pytest.mark.parametrize("name", STUDIES)
def test_a_configuration_takes_the_place_of_bundled_flags(name):
    study = study_of(name)
    own = study.by_label(configured=True)
    assert own
    for settings in own.values():
        assert study.always.items() <= settings.items()
        assert not study.bundled.keys() & settings.keys() - {"depth", "hidden"}


def test_a_study_from_its_command_and_on(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "study"
    command = [sys.executable, str(RECIPES / "studies" / "spectrum.py"), "--seeds", "1", *TINY.split(), "--hidden", "8"]
    env = {**os.environ, **ASCII}
    result = subprocess.run([*command, "--output_dir", folder], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stderr
    assert "3 of 3 runs to do" in result.stdout
    assert "effective rank" in (folder / "findings.txt").read_text(encoding="utf-8")
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
    (folder / "no-random-labels" / "seed-0" / "done").unlink()
    result = subprocess.run([*command, "--resume", folder], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "1 of 3 runs to do" in result.stdout
    assert {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")} == logs
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for wrong, message in (
        ([*command, "--output_dir", folder], "is not empty"),
        ([*command, "--resume", tmp_path], "expected the folder of a study"),
        ([*command[:-1], "9", "--resume", folder], "expected the further flags of the resumed study"),
        ([*command[:-1], "x", "--output_dir", tmp_path / "bad"], "invalid int value: 'x'"),
    ):
        monkeypatch.setattr(sys, "argv", [str(word) for word in wrong[1:]])
        with pytest.raises(SystemExit) as stop:
            importlib.import_module("studies.study").main(study_of("spectrum"), None)
        assert stop.value.code
        assert message in f"{capsys.readouterr().err} {stop.value}"
    assert not (tmp_path / "bad").exists()
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_study_that_is_stopped(tmp_path):
    """Its runs stop with it, and it goes on by its folder alone."""
    folder = tmp_path / "study"
    flags = [*TINY.split(), "--steps", "400", "--checkpointing_steps", "5"]
    command = [
        sys.executable,
        str(RECIPES / "studies" / "spectrum.py"),
        "--seeds",
        "1",
        "--output_dir",
        str(folder),
        *flags,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(folder.glob("*/seed-0/checkpoints/step_*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert f"stopped\ncontinue with --resume {folder}" in said
    assert not psutil.wait_procs(children, timeout=PATIENCE)[
        1
    ]  # one that keeps track of resources ends after the others
    seen = {path: path.read_text() for path in folder.rglob("metrics.jsonl")}
    command = [sys.executable, str(RECIPES / "studies" / "spectrum.py"), "--resume", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for path, log in seen.items():
        assert path.read_text().startswith(log)


def quantity(name, data, model, kernel_size, **options):
    """One of the quantities, outside a run."""
    module = importlib.import_module("training.measure")
    accelerator = types.SimpleNamespace(is_main_process=True, device=torch.device("cpu"))
    seen = module.Seen(accelerator, model, data, types.SimpleNamespace(kernel_size=kernel_size))
    return module.QUANTITIES[name](seen, **options)


def test_quantities_are_what_they_say(tmp_path):
    """Against the kernel from rows of the Jacobian."""
    data = importlib.import_module("data.examples").load("disk", train_size=120, label_noise=0.4, seed=0)
    torch.manual_seed(0)
    model, n = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 2)), 30
    found = {
        name: quantity(name, data, model, n)(tmp_path, 7) for name in ("ranks", "spectrum", "layers", "groups", "norms")
    }
    x, y = data.train_x[:n], data.train_y[:n]
    double = copy.deepcopy(model).double()
    K = oracles.kernel(oracles.centered_features(oracles.jacobian(double, x.double())))
    eigenvalues = oracles.eigenvalues(K)
    for name in ("ranks", "spectrum"):
        assert found[name]["train/effective_rank"] == pytest.approx(oracles.effective_rank(K), rel=1e-3)
    ratio = eigenvalues[:10].sum() / eigenvalues.sum()
    assert found["spectrum"]["train/trace_ratio_10"] == pytest.approx(ratio, rel=1e-4)
    assert found["spectrum"]["train/eigenvalue_3"] == pytest.approx(eigenvalues[2], rel=1e-3)
    for layer in ("0", "2"):
        jac = {k: v for k, v in oracles.jacobian(double, x.double()).items() if k.startswith(layer)}
        expected = oracles.alignment(jac, oracles.one_hot(y, 2))
        assert found["layers"][f"layer/{layer}"] == pytest.approx(float(expected), rel=1e-4)
    for name, mark in (("easy", ~data.difficult), ("difficult", data.difficult)):
        rows = mark.nonzero()[:n, 0]
        jac = oracles.jacobian(double, data.train_x[rows].double())
        expected = oracles.alignment(jac, oracles.one_hot(data.train_y[rows], 2))
        assert found["groups"][f"{name}/alignment"] == pytest.approx(float(expected), rel=1e-4)
    assert found["norms"]["norm/distance"] == 0
    assert found["norms"]["norm/Frobenius product"] == pytest.approx(
        math.prod(float(p.square().sum()) for p in model.parameters() if p.ndim == 2), rel=1e-6
    )


def test_eigenfunctions_continue_the_eigenvectors(tmp_path):
    data = importlib.import_module("data.examples").load("disk", train_size=40, seed=0)
    torch.manual_seed(0)
    model, n = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 2)), 15
    quantity("plane", data, model, n)(tmp_path, 2)
    assert load_file(tmp_path / "plane-2.safetensors")["outputs"].shape == (41 * 41,)
    values = quantity("plane", data, model, n, grid=data.train_x[:n])(tmp_path, 3)
    arrays = load_file(tmp_path / "plane-3.safetensors")

    def difference(model, x):
        logits = model(x)
        return (logits[:, 1] - logits[:, 0])[:, None]

    x = data.train_x[:n].double()
    K = oracles.kernel(oracles.jacobian(copy.deepcopy(model).double(), x, difference)).reshape(n, n)
    u, eigenvalues = arrays["eigenfunctions"].double(), arrays["eigenvalues"]
    torch.testing.assert_close(K @ u[:, :4], eigenvalues[:4] * u[:, :4], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(u[:, :4].T @ u[:, :4] / n, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-3)
    torch.testing.assert_close(arrays["tangent_norm"].double(), K.diagonal().sqrt(), rtol=1e-4, atol=1e-5)
    assert values["plane/ratio_20"] == pytest.approx(float(eigenvalues[-1] / eigenvalues[0]))
    inputs = x.clone().requires_grad_()
    slopes = torch.autograd.grad(difference(copy.deepcopy(model).double(), inputs).sum(), inputs)[0].norm(dim=1)
    torch.testing.assert_close(arrays["input_gradient"].double(), slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--measure groups", "expected 10 easy and 10 difficult examples for groups, got fewer difficult ones"),
        ("--measure plane", "expected a data set of points for plane"),
    ],
)
def test_quantities_that_the_data_do_not_have(flags, message, tmp_path):
    result = run("--output_dir", tmp_path / "run", *flags.split())
    assert result.returncode == 1
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()
