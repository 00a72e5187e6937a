"""The networks of the recipes, and the configurations that name them."""

import math
import sys
from itertools import pairwise

import pytest
import torch
import yaml
from paths import RECIPES
from recipe_runs import LAUNCH, SPAWN, finish, load, parse, read, recipe, start
from safetensors.torch import load_file
from test_recipe_data import write
from torch import nn

from alignreg import TangentFeatures

IMAGES = ("mlp", "cnn", "vgg11", "vgg13", "vgg16", "vgg19", "resnet18", "transformer")


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", IMAGES)
def test_every_network_for_every_shape(name, shape):
    models = load("training.models")
    assert set(IMAGES) == set(models.WIDTHS)
    net = models.build(name, shape, 7, hidden=4)
    assert net(torch.randn(3, *shape)).shape == (3, 7)
    ids = [id(p) for p in net.parameters()]
    assert len(ids) == len(set(ids))
    wide = models.build(name, shape, 7, hidden=8)
    assert sum(p.numel() for p in wide.parameters()) > 1.3 * sum(p.numel() for p in net.parameters())


# Counted by hand from the published tables: 3 x 3 convolutions with biases, one linear layer.
PLANS = {
    "vgg11": [64, 128, 256, 256, 512, 512, 512, 512],
    "vgg13": [64, 64, 128, 128, 256, 256, 512, 512, 512, 512],
    "vgg16": [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512],
    "vgg19": [64, 64, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512, 512],
}


@pytest.mark.parametrize("name", PLANS)
def test_vgg_as_published(name):
    net = load("training.models").build(name, (3, 32, 32), 10)
    channels = [3, *PLANS[name]]
    expected = sum(9 * a * b + b for a, b in zip(channels, channels[1:], strict=False)) + 512 * 10 + 10
    assert sum(p.numel() for p in net.parameters()) == expected
    assert [m.out_channels for m in net if isinstance(m, nn.Conv2d)] == PLANS[name]
    assert sum(isinstance(m, nn.MaxPool2d) for m in net) == 5
    normalized = load("training.models").build(name, (3, 32, 32), 10, batch_norm=True, hidden=4)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in normalized) == len(PLANS[name])


def test_resnet18_as_published():
    models = load("training.models")
    net = models.build("resnet18", (3, 32, 32), 10, batch_norm=True)
    assert sum(p.numel() for p in net.parameters()) == 11_173_962  # of the CIFAR version, with 10 classes
    plain = models.build("resnet18", (3, 32, 32), 10, hidden=8)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    sizes = []
    for module in net.modules():
        if isinstance(module, models.Residual):
            module.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[1:])))
    net(torch.randn(2, 3, 32, 32))
    assert sizes == [(64, 32, 32)] * 2 + [(128, 16, 16)] * 2 + [(256, 8, 8)] * 2 + [(512, 4, 4)] * 2


def test_layers_and_depths():
    models = load("training.models")
    net = models.build("mlp", (1, 8, 8), 10, hidden=8, depth=5)
    weights = [p for p in net.parameters() if p.ndim == 2]
    assert len({id(p) for p in weights}) == 5
    assert sum(isinstance(m, nn.Conv2d) for m in models.build("cnn", (1, 8, 8), 10, depth=4)) == 3
    assert len(models.build("transformer", (1, 8, 8), 10, depth=3).blocks.layers) == 3


@pytest.mark.parametrize("name", IMAGES)
def test_kaiming_weights(name):
    torch.manual_seed(0)
    net = load("training.models").build(name, (3, 32, 32), 10, hidden=16, init="kaiming")
    checked = 0
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            n = module.weight.numel()
            # The mean square of n normal numbers has a relative standard deviation of (2/n)^(1/2).
            assert float(module.weight.detach().square().mean()) == pytest.approx(2 / fan_in, rel=5 * math.sqrt(2 / n))
            assert module.bias is None or not module.bias.any()
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "transformer"])
def test_their_kernels_are_exact(name):
    torch.manual_seed(0)
    net = load("training.models").build(name, (1, 8, 8), 3, hidden=4, batch_norm=name == "resnet18").double().eval()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    features = TangentFeatures(net)
    rows = torch.cat([p.flatten(2) for p in features.jacobian(x).values()], dim=2)
    kernel = torch.einsum("ikp,jlp->ikjl", rows, rows)
    torch.testing.assert_close(features.kernel(x), kernel, rtol=1e-9, atol=1e-12)


CONFIGS = sorted(path.relative_to(RECIPES / "configs") for path in (RECIPES / "configs").glob("*/*.yaml"))


def resnet18_numbers(channels, width):
    """Parameters and buffers of ResNet18 with BatchNorm: four numbers a channel, and a counter, each."""

    def convolution(a, b, size=3):
        return size * size * a * b + 4 * b + 1

    total, a = convolution(channels, width), width
    for stage in range(4):
        b = width << stage
        total += convolution(a, b) + 3 * convolution(b, b) + (convolution(a, b, 1) if stage else 0)
        a = b
    return total + (a + 1) * 10


SIZES = {
    "bundled/digits-noise": 65 * 256 + 257 * 256 + 257 * 10,
    "bundled/digits-mixed": 65 * 60 + 4 * 61 * 60 + 61 * 10,
    "bundled/digits-resnet18": resnet18_numbers(1, 8),
    "paper/mnist-mlp": 785 * 80 + 4 * 81 * 80 + 81 * 10,
    "paper/mnist-kmnist-mlp": 785 * 60 + 4 * 61 * 60 + 61 * 10,
    "paper/cifar10-vgg19": sum(9 * a * b + b for a, b in pairwise([3, *PLANS["vgg19"]])) + 513 * 10,
    "paper/cifar10-resnet18": resnet18_numbers(3, 64),
    "compare/mnist-mlp": 785 * 256 + 257 * 256 + 257 * 10,
    "compare/cifar10-resnet18": resnet18_numbers(3, 16),
}
# Measurements at their least: what is tried is the network, at its full size.
LEAST = "--cpu --max_steps 3 --probe_size 10 --sketch_dim 3 --kernel_size 2"


@pytest.mark.parametrize("path", CONFIGS, ids=str)
@pytest.mark.usefixtures("recipes_in_this_process")
def test_configurations_make_three_steps(path, tmp_path, monkeypatch, capsys):
    """On generated data of the right shape, with all flags of the configuration but the size of the data."""
    config, _ = parse(["--config", str(RECIPES / "configs" / path)])
    flags = LEAST.split()
    if path.parent.name != "bundled":
        assert config.steps >= 10_000
        for flag, name in (("data_path", config.dataset), ("mix_path", config.mix)):
            if name:
                write(name, "arrow", tmp_path / name, train=max(config.batch_size, 30) + 20, test=20)
                flags += [f"--{flag}", str(tmp_path / name)]
        batch = config.batch_size if config.model == "mlp" else 16
        flags += ["--train_size", str(batch), "--batch_size", str(batch)]
        flags += ["--mix_size", "20"] if config.mix else []
        flags += ["--val_size", "20"] if config.val_size else []
    folder = tmp_path / "run"
    given = yaml.safe_load((RECIPES / "configs" / path).read_text())
    assert {key: getattr(config, key) for key in given} == given
    recipe("train", monkeypatch, "--config", RECIPES / "configs" / path, "--output_dir", folder, *flags)
    assert [line["step"] for line in read(folder)] == [0]
    assert "stopped by --max_steps after step 3" in capsys.readouterr().out
    saved = load_file(folder / "checkpoints" / "step_3" / "model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == SIZES[str(path.with_suffix(""))]


@pytest.mark.parametrize("name", ["single", "two_cpu"])
def test_launch_configurations(name, tmp_path):
    launcher = [*LAUNCH[:-1], str(RECIPES / "configs" / f"{name}.yaml")]
    result = finish(start("--steps", 2, *LEAST.split(), "--output_dir", tmp_path / "run", launcher=launcher))
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in read(tmp_path / "run")] == [0, 2]


def test_other_files_of_flags(tmp_path, capsys):
    for text, message in (
        ("[1]", "got another kind of file"),
        ("speed: 3", "flags that this recipe does not know: speed"),
    ):
        (tmp_path / "flags.yaml").write_text(text)
        with pytest.raises(SystemExit):
            parse(["--config", str(tmp_path / "flags.yaml")])
        assert message in " ".join(capsys.readouterr().err.split())
    for text, message in (("lr: fast", "--lr: expected float, got 'fast'"), ("steps: true", "--steps: expected int")):
        (tmp_path / "flags.yaml").write_text(text)
        with pytest.raises(SystemExit):
            parse(["--config", str(tmp_path / "flags.yaml")])
        assert message in " ".join(capsys.readouterr().err.split())


def test_yaml_does_not_run_code(tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text("!!python/object/apply:os.system ['touch ran']")
    with pytest.raises(SystemExit):
        parse(["--config", str(tmp_path / "flags.yaml")])
    assert "got another kind of file" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "ran").exists()


ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]


@pytest.mark.parametrize(
    ("model", "regularizer", "two"),
    [
        ("vgg11", "alignment", SPAWN),
        ("resnet18 --batch_norm", "complexity", ACCELERATE),
        # The other pairs: pytest -m thorough tests/recipes/test_recipe_models.py
        pytest.param("vgg11", "complexity", ACCELERATE, marks=pytest.mark.thorough),
        pytest.param("resnet18 --batch_norm", "alignment", SPAWN, marks=pytest.mark.thorough),
    ],
)
def test_convolutional_networks_on_two_processes(model, regularizer, two, tmp_path):
    flags = f"--model {model} --hidden 8 --regularizer {regularizer} --weight 0.01 --steps 4 --train_size 128 --cpu"
    flags += " --sketch_dim 4 --probe_size 110 --kernel_size 10 --batch_size 16 --reg_examples 8"
    logs = []
    for launcher in (two, [sys.executable]):
        folder = tmp_path / str(len(logs))
        result = finish(start(*flags.split(), "--output_dir", folder, launcher=launcher))
        assert result.returncode == 0, result.stderr
        logs.append(read(folder))
    assert [line["step"] for line in logs[0]] == [0, 4]
    # 110 probes are two batches of one process and one of each of two: nothing is counted twice.
    assert logs[0][0] == pytest.approx(logs[1][0], rel=1e-4)
