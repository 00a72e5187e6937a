"""Regularizers of train.py, and their options."""

import oracles
import pytest
import torch
from recipe_runs import module, parse
from torch import nn
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.usefixtures("recipes_in_this_process")


def test_fisher_penalty_is_unbiased_and_its_gradient_that_of_its_value():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(12, 4, dtype=torch.float64)
    p = net(x).softmax(1).detach()
    jac = oracles.matrix(oracles.jacobian(net, x)).reshape(12, 3, -1)
    scores = jac - (p[:, :, None] * jac).sum(1, keepdim=True)  # ∇ log p_k = ∇ f_k − Σ_j p_j ∇ f_j
    trace = float((p * scores.square().sum(2)).sum(1).mean())
    kind = module("training.regularizers").FisherPenalty
    reg = kind(net, weight=1.0, examples=None, every_n_steps=1, seed=3, clip=None)
    with torch.no_grad():
        values = torch.stack([reg(x) for _ in range(600)])
    assert abs(float(values.mean()) - trace) / float(values.std() / 600**0.5) < 3.5
    assert float(values.std()) > 0

    def value():
        return kind(net, weight=2.0, examples=None, every_n_steps=1, seed=5, clip=None)(x)

    value().backward()
    weight = net[0].weight
    slope = weight.grad[2, 1].item()
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[2, 1] += sign * 1e-5
            sides.append(float(value()))
            weight[2, 1] -= sign * 1e-5
    assert slope == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5)


def prepared(*flags):
    return module("training.loop").prepare(parse(["--cpu", "--measure=", "--hidden", "8", *flags])[0])


def test_label_smoothing():
    run = prepared("--label_smoothing", "0.3")
    x, y = run.data.train_x[:20], run.data.train_y[:20]
    logits = run.model(x)
    target = 0.7 * oracles.one_hot(y, 10) + 0.03
    expected = -(target * logits.double().log_softmax(1)).sum(1).mean()
    assert float(module("training.loop").loss(run, logits, x, y)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("", {}),
        ("--no-reg_centered", {"centered": False}),
        ("--reg_per_layer", {"per_layer": True}),
        ("--reg_layers hidden", {"params": ["1.*", "3.*"]}),
        ("--reg_layers last", {"params": ["5.*"]}),
        ("--reg_probes 5", {"probes": 5}),
        ("--reg_examples 20", {"examples": 20}),
        ("--reg_pool 30", {}),
    ],
)
def test_options_of_a_regularizer(flags, options):
    """The loss of a run beside the library's own."""
    run = prepared("--regularizer", "alignment", "--weight", "0.2", *flags.split())
    data = run.data
    x, y = data.train_x[100:140], data.train_y[100:140]
    logits = run.model(x)
    own = module("training.regularizers").AlignmentLoss(
        run.model, **{"weight": 0.2, "examples": 32, "every_n_steps": 1, **options}
    )
    seen = (data.train_x[:30], data.train_y[:30]) if "pool" in flags else (x, y)
    expected = cross_entropy(logits, y) + own(*seen)
    assert float(module("training.loop").loss(run, logits, x, y)) == pytest.approx(float(expected), rel=1e-6)


def test_a_regularizer_for_a_part_of_training():
    flags = "--regularizer complexity --weight 0.2 --steps 10 --reg_from 0.2 --reg_until 0.5"
    run = prepared(*flags.split())
    x, y = run.data.train_x[:40], run.data.train_y[:40]
    logits = run.model(x)
    task = float(cross_entropy(logits, y))
    assert [float(module("training.loop").loss(run, logits, x, y)) > task + 1e-4 for _ in range(10)] == [
        2 <= step < 5 for step in range(10)
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--regularizer fisher --weight 1 --reg_per_layer", "expected a regularizer of the kernel, got fisher"),
        ("--regularizer kare --weight 1 --reg_probes 3", "expected a regularizer that uses probes, got kare"),
    ],
)
def test_options_that_a_regularizer_does_not_have(flags, message, capsys):
    with pytest.raises(SystemExit):
        prepared(*flags.split())
    assert message in capsys.readouterr().err
