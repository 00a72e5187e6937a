"""The recipes as a user runs them."""

import ast
import json
import shutil
import subprocess
import sys

import pytest
import torch
from paths import RECIPES, ROOT
from recipe_runs import KEYS, SPAWN, TINY, finish, load, parse, read, read_wandb, recipe, run, start
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    result = run("--output_dir", folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_one_process(first):
    folder, result = first
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "examples.safetensors",
        "figure.png",
        "metrics.jsonl",
    ]
    log = read(folder)
    assert [line["step"] for line in log] == [0, 5, 6]
    assert all(list(line) == KEYS for line in log)
    assert log[-1]["train/loss"] < log[0]["train/loss"]
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder / "metrics.jsonl") in result.stdout
    assert "participation" in result.stdout
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["hidden"] == 16
    assert set(config["versions"]) == {"alignreg", "torch", "python"}
    assert "--hidden" in config["command"]
    assert config["git"] is None or len(config["git"].removesuffix("-dirty")) == 40
    examples = load_file(folder / "examples.safetensors")
    assert {key: tuple(value.shape) for key, value in examples.items()} == dict.fromkeys(
        ("rows", "labels", "difficult"), (128,)
    )


def test_same_flags_give_the_same_bytes_in_a_new_folder(first, tmp_path):
    folder, _ = first
    result = run("--config", folder / "config.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (again,) = (tmp_path / "runs").iterdir()
    assert (again / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_two_processes_measure_the_same_network(first, tmp_path):
    """At step 0 networks, examples and batches are the same: nothing but the order of sums differs."""
    result = run("--output_dir", tmp_path / "run", launcher=SPAWN)
    assert result.returncode == 0, result.stderr
    log = read(tmp_path / "run")
    assert log[0] == pytest.approx(read(first[0])[0], rel=1e-5)
    assert [line["step"] for line in log] == [0, 5, 6]


def test_processes_without_a_batch_are_refused(tmp_path):
    result = run("--output_dir", tmp_path / "run", "--train_size", 100, launcher=SPAWN)
    assert result.returncode != 0
    assert "expected a batch of 64 for each of 2 process(es), got 100" in result.stderr
    assert not (tmp_path / "run").exists()


def test_wandb_offline(tmp_path):
    """What was logged can be read back: keys at their steps, best values, the figure; also of a run that goes on."""
    folder = tmp_path / "run"
    offline = {"WANDB_MODE": "offline", "cwd": tmp_path}
    result = run("--output_dir", folder, "--with_tracking", "--max_steps", 5, **offline)
    assert result.returncode == 0, result.stderr
    result = finish(start("--resume_from_checkpoint", folder, **offline))
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    log = read(folder)
    first, second = sorted((folder / "wandb").glob("offline-run-*"))
    parts = [read_wandb(*part.glob("run-*.wandb")) for part in (first, second)]
    assert parts[0]["id"] == parts[1]["id"]
    assert [[row["step"] for row in part["history"] if "step" in row] for part in parts] == [[0, 5], [6]]
    rows = [row for part in parts for row in part["history"] if "step" in row]
    assert [{key: row[key] for key in KEYS} for row in rows] == log
    for part, whole in zip(parts, (log[:2], log), strict=True):
        assert part["config"]["hidden"] == 16
        assert part["metrics"] == {"step", "*"}
        for key, best in (("test/accuracy", max), ("train/loss", min), ("test/alignment", max)):
            assert part["summary"][f"{key}_best"] == best(line[key] for line in whole)
        assert part["summary"]["figure/_type"] == "image-file"
    for part in (first, second):
        (image,) = (part / "files/media/images").glob("figure*.png")
        assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags",
    [
        "--regularizer alignment --weight 0.1 --reg_every 2 --mixed_precision bf16",
        "--dataset disk --regularizer complexity --weight 0.01 --reg_examples 8",
        "--dataset disk",
        "--model cnn --weight_decay 0.01 --label_noise 0.4 --augment",
    ],
)
@pytest.mark.usefixtures("recipes_in_this_process")
def test_other_data_and_models(flags, tmp_path, monkeypatch):
    recipe("train", monkeypatch, *TINY.split(), *flags.split(), "--output_dir", tmp_path / "run")
    assert len(read(tmp_path / "run")) == 3


def test_figure_has_its_title(first, tmp_path, monkeypatch):
    figure, drawn = load("training.plots"), []
    monkeypatch.setattr(figure.pyplot().Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    figure.draw({"none": read(first[0])}, "the task", tmp_path / "figure.png")
    assert drawn[0].get_suptitle() == "the task"
    titles = [axis.get_title() for axis in drawn[0].axes]
    assert titles == [
        "accuracy",
        "alignment with the labels, ± 2 s.e.",
        "rank of the centered tangent kernel",
        "path complexity",
    ]


@pytest.mark.usefixtures("recipes_in_this_process")
def test_overlay_of_two_runs(first, tmp_path, monkeypatch):
    folder, _ = first
    other = tmp_path / "other"
    flags = [*TINY.split(), "--regularizer", "complexity", "--weight", "0.5"]
    recipe("train", monkeypatch, *flags, "--output_dir", other)
    command = [sys.executable, str(RECIPES / "overlay.py"), "--output_dir", str(tmp_path / "both")]
    twin = shutil.copytree(other, tmp_path / "twin")
    result = subprocess.run([*command, folder, other, twin], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "both" / "figure.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    assert "none" in rows
    assert rows.count("complexity") == 2  # the same label twice keeps both
    assert f"{read(folder)[-1]['test/accuracy']:.3f}" in result.stdout
    assert "complexity 0.5 (twin)" in result.stdout
    config = twin / "config.json"
    config.write_text(config.read_text().replace('"label_noise": 0.0', '"label_noise": 0.2'))
    result = subprocess.run([*command, folder, twin], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "expected runs of one task" in result.stderr
    result = subprocess.run([*command, tmp_path / "nowhere"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "expected the folder of a run" in result.stderr


BAD = {
    "--label_noise 1.5": r"--label_noise: expected a number between 0 and 1, got 1.5",
    "--label_noise -0.1": r"--label_noise: expected a number between 0 and 1",
    "--label_noise nan": r"--label_noise: expected a number between 0 and 1",
    "--dataset imagenet": "--dataset: expected one of digits, rotated_digits, disk",
    "--model vgg": "--model: expected one of mlp, cnn",
    "--regularizer magic": "--regularizer: expected one of none, alignment, complexity",
    "--weight -1 --regularizer alignment": "--weight: expected a number of at least 0, got -1",
    "--weight_decay -1": "--weight_decay: expected a number of at least 0, got -1",
    "--weight 0.1": "expected a --regularizer with it",
    "--regularizer alignment": "--weight: expected a positive number with --regularizer alignment, got 0",
    "--train_size -1": "--train_size: expected a number of at least 0",
    "--mix rotated_digits": "--mix_size: expected --mix and --mix_size together",
    "--mix_size 5": "--mix_size: expected --mix and --mix_size together",
    "--mix imagenet --mix_size 5": "--mix: expected one of",
    "--data_path x": "--data_path: expected an image data set with it, got digits, which needs no folder",
    "--mix_path x": "--mix_path: expected an image data set with it, got None",
    "--depth 1": "--depth: expected at least 2 layers",
    "--depth 3 --model vgg11": "--depth: expected mlp, cnn, transformer with it, got vgg11",
    "--batch_norm": "--batch_norm: expected vgg or resnet18 with it, got mlp",
    "--augment --dataset disk": "--augment: expected images, got disk",
    "--init magic": "--init: expected one of torch, kaiming",
    "--max_steps -1": "--max_steps: expected a number of at least 0",
    "--log_spacing 1": "--log_spacing: expected a number of at least 1.01",
    "--sketch_dim 2": "--sketch_dim: expected a number between 3 and 100000, got 2",
    "--steps -1": "--steps: expected a number of at least 0",
    "--dataset disk --model cnn": "points, not images",
    "--config missing.json": "missing.json: No such file",
    "--config Makefile": "got another kind of file",
    "--lr nan": "--lr: expected a number of at least 0",
    "--lr inf": "--lr: expected a number of at least 0",
    "--momentum 2": "--momentum: expected a number between 0 and 1",
    "--seed -1": "--seed: expected a number between 0 and 4294967295, got -1",
    "--seed 4294967296": "--seed: expected a number between 0 and 4294967295, got 4294967296",
    "--hidden 100000000000": "--hidden: expected a number between 0 and 1000000000, got 100000000000",
    f"--steps {10**30}": f"--steps: expected a number between 0 and {2**63 - 1}",
    "--output_dir a\0b": "--output_dir: expected text without zero bytes, got 'a\\x00b'",
    "--depth 1000000": "--depth: expected a number between 0 and 10000",
    "--sketch_dim 100000000000": "--sketch_dim: expected a number between 3 and 100000",
    "--reg_examples 1": "--reg_examples: expected a number of at least 2",
    "--reg_every 0": "--reg_every: expected a number of at least 1",
    "--checkpointing_steps -1": "--checkpointing_steps: expected a number of at least 0",
    "--resume_from_checkpoint nowhere": "nowhere: No such folder",
    "--resume_from_checkpoint .": "it holds no manifest.json and no checkpoints/step_N",
    "--resume_from_checkpoint . --config x": "not allowed with argument",
    "--mixed_precision fp3": "--mixed_precision: expected one of",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_make_nothing(flags, tmp_path, monkeypatch, capsys):
    (tmp_path / "Makefile").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        parse(flags.split())
    assert stop.value.code == 2
    assert BAD[flags] in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["Makefile"]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    result = run("--output_dir", tmp_path / "file" / "run")
    assert result.returncode != 0
    assert "expected a writable folder" in result.stderr
    assert "Not a directory" in result.stderr
    assert (tmp_path / "file").read_text() == "kept"


def test_split_launch_is_refused(monkeypatch):
    module = load("training.processes")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="Accelerate sees one"):
        module.refuse_split_launch(1)
    module.refuse_split_launch(2)
    monkeypatch.delenv("WORLD_SIZE")
    module.refuse_split_launch(1)


FEW = {
    "--train_size 1001": "--train_size: expected at most the 1000 training examples of digits, got 1001",
    "--train_size 10": "--batch_size: expected a batch of 64 for each of 1 process(es), got 10",
    "--mix rotated_digits --mix_size 1001": "--mix_size: expected at most the 1000 examples of rotated_digits",
    "--mix disk --mix_size 10": "--mix: expected a data set of the same shape and classes, (1, 8, 8) and 10",
    "--dataset mnist --data_path nowhere": "nowhere: No such folder",
}


@pytest.mark.usefixtures("recipes_in_this_process")
@pytest.mark.parametrize("flags", FEW)
def test_data_that_do_not_fit_make_nothing(flags, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        recipe("train", monkeypatch, *TINY.split(), *flags.split(), "--output_dir", tmp_path / "run")
    assert FEW[flags] in " ".join(str(stop.value).split())
    assert not (tmp_path / "run").exists()


def test_several_processes_of_which_accelerate_starts_one(tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    result = run("--output_dir", tmp_path / "run", launcher=launcher)
    assert result.returncode != 0
    assert "on CPUs it starts only one process" in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dataset", ["digits", "disk"])
def test_label_noise(dataset):
    data = load("data.examples")
    clean, half, noise = (data.load(dataset, train_size=1000, label_noise=p, seed=3) for p in (0, 0.5, 1))
    assert torch.equal(clean.train_x, half.train_x)
    assert torch.equal(clean.test_y, noise.test_y)
    c = clean.num_classes
    for noisy, share in ((half, 0.5), (noise, 1.0)):
        wrong = float((noisy.train_y != clean.train_y).double().mean())
        expected = share * (1 - 1 / c)  # redrawn uniformly: one in c stays right
        assert wrong == pytest.approx(expected, abs=3.5 * (expected * (1 - expected) / 1000) ** 0.5)
    assert torch.equal(half.train_y, data.load(dataset, train_size=1000, label_noise=0.5, seed=3).train_y)
    assert not torch.equal(half.train_y, data.load(dataset, train_size=1000, label_noise=0.5, seed=4).train_y)
    assert len(data.load(dataset, train_size=100, label_noise=0, seed=0).train_x) == 100


def test_layers_of_the_mlp_are_distinct():
    model = load("training.models").build("mlp", (1, 8, 8), 10, hidden=8, depth=5)
    weights = [p for p in model.parameters() if p.ndim == 2]
    assert len({id(p) for p in weights}) == 5
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_nothing_imports_recipes():
    for path in (*(ROOT / "alignreg").rglob("*.py"), *RECIPES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "recipes" for name in names), path
