"""Adapters, with the packages that they adapt to, against plain loops."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from callback_cases import VALIDATED, Keywords, Scaled, data, difference, distance, flat, measured, trained_plainly
from pages import python_blocks, run_blocks
from paths import DOCS
from ranks import run_two
from torch import nn
from torchmetrics import SumMetric

from alignreg.callbacks.monitor import unpack_batch
from alignreg.metrics import PathComplexity, TangentAlignment

PAGE = DOCS / "adapters.md"
TOLERANCE = 1e-10  # models are in float64


@pytest.fixture(scope="module")
def runs():
    pytest.importorskip("lightning")
    pytest.importorskip("transformers")
    import callback_runs

    return callback_runs


@pytest.fixture(scope="module")
def two_ranks(runs, tmp_path_factory):
    return run_two("callback_worker.py", tmp_path_factory.mktemp("ranks"))


def same(title, found, expected):
    """Values of each validation are those of the plain loop, and change from one to the next."""
    assert len(found) == len(expected)
    assert expected[0] != expected[1]
    worst = max(map(difference, found, expected))
    print(f"\n{title}: {len(expected[0])} values in {len(found)} validations, largest relative difference {worst:.1e}")
    assert worst <= TOLERANCE


def test_lightning_is_a_plain_loop(runs, tmp_path):
    found, module = runs.lightning_run(tmp_path, 26)
    expected, plain = runs.lightning_plainly(26, ranks=1)
    same("lightning, one process", found, expected)
    assert distance(flat(module), flat(plain)) <= TOLERANCE


def test_lightning_on_two_ranks_is_a_plain_loop(runs, two_ranks):
    expected, _ = runs.lightning_plainly(24, ranks=2)
    for found in two_ranks:
        same("lightning, two processes", found["lightning"], expected)


def test_transformers_is_a_plain_loop(runs, tmp_path):
    expected = runs.transformers_plainly(36, VALIDATED, ranks=1)
    same("transformers, one process", runs.transformers_run(tmp_path, 36, VALIDATED), expected)


def test_transformers_on_two_ranks_is_a_plain_loop(runs, two_ranks):
    expected = runs.transformers_plainly(40, VALIDATED, ranks=2)
    for found in two_ranks:
        same("transformers, two processes", found["transformers"], expected)


WAYS = {
    "plain": lambda runs: {},
    "scaled": lambda runs: {"model": Scaled()},
    "compute_loss_func": lambda runs: {"compute_loss_func": runs.losses},
}


@pytest.mark.parametrize("way", WAYS)
def test_regularized_weights_are_those_of_a_plain_loop(runs, tmp_path, way):
    expected = trained_plainly(Keywords(), 36)
    far = runs.regularized(tmp_path, 36, expected, **WAYS[way](runs))
    print(f"\n{way}, one process: weights differ by {far:.1e}")
    assert far <= TOLERANCE


def test_lightning_trains_regularized_as_a_plain_loop(runs, tmp_path):
    assert runs.lightning_regularized(tmp_path) <= TOLERANCE


@pytest.mark.parametrize("way", [*WAYS, "lightning"])
def test_regularized_weights_of_two_ranks_are_those_of_a_plain_loop(two_ranks, way):
    for found in two_ranks:
        print(f"\n{way}, two processes: weights differ by {found['weights'][way]:.1e}")
        assert found["weights"][way] <= TOLERANCE


def test_resumed_regularizer_goes_on(runs, tmp_path):
    options = {"eval_strategy": "no", "save_strategy": "epoch", "gradient_accumulation_steps": 2}
    whole = runs.trainer(tmp_path, 36, 8, regularizer=runs.penalty, options=options)
    whole.train()
    first, *_ = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    resumed = runs.trainer(tmp_path, 36, 8, regularizer=runs.penalty, options=options)
    resumed.train(resume_from_checkpoint=str(first))
    assert distance(flat(resumed.model), flat(whole.model)) <= TOLERANCE


def count(batch):
    return {"value": torch.tensor(float(len(batch["labels"] if isinstance(batch, dict) else batch[0])))}


def counted(_):
    return SumMetric()


def test_lightning_counts_each_validation_alone(runs, tmp_path):
    values, monitor = runs.Values(), runs.TangentMonitor(counted, unpack=count)
    runs.lightning_trainer(tmp_path, monitor, values, num_sanity_val_steps=2).fit(
        runs.Module(), runs.loader(8), runs.loader(18)
    )
    assert [seen["tangent/SumMetric"] for seen in values.seen] == [18, 18]


def test_lightning_on_several_loaders_and_along_training(runs, tmp_path):
    values = runs.Values()
    along = runs.TangentMonitor(counted, unpack=count, max_batches=2, reset=False, prefix="along")
    trainer = runs.lightning_trainer(tmp_path, along, values, num_sanity_val_steps=2)
    trainer.fit(runs.Module(), runs.loader(8), [runs.loader(18), runs.loader(6)])
    found = [[seen[f"along/SumMetric/dataloader_idx_{index}"] for index in (0, 1)] for seen in values.seen]
    assert found == [[8, 6], [16, 12]]


def test_lightning_logs_through_its_loggers_under_autocast(runs, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    module = runs.Module().float()
    x, y = data(16, 0)
    loader = runs.loader_of(x.float(), y)
    monitor, logger = runs.TangentMonitor(runs.metrics), CSVLogger(tmp_path)
    trainer = runs.lightning_trainer(tmp_path, monitor, precision="bf16-mixed", logger=logger)
    (returned,) = trainer.validate(module, loader, verbose=False)
    assert module.inference_modes == {True}
    expected = measured(module, loader)
    assert difference(returned, expected) <= 1e-6
    header, row = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    written = dict(zip(header.split(","), row.split(","), strict=True))
    assert difference({name: float(written[name]) for name in expected}, expected) <= 1e-6


def test_older_package_serves_where_it_is_alone(runs, tmp_path, monkeypatch):
    from pytorch_lightning import Callback

    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "alignreg.callbacks.lightning")
    assert issubclass(importlib.import_module("alignreg.callbacks.lightning").TangentMonitor, Callback)


@pytest.mark.parametrize(
    ("name", "missing", "install"),
    [
        ("lightning", ["lightning.pytorch", "pytorch_lightning"], "pip install lightning"),
        ("transformers", ["transformers"], "pip install transformers"),
    ],
)
def test_missing_package_is_named(monkeypatch, name, missing, install):
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"alignreg.callbacks.{name}", raising=False)
    with pytest.raises(ImportError, match=install):
        importlib.import_module(f"alignreg.callbacks.{name}")


def test_transformers_measures_evaluations_alone(runs, tmp_path):
    run = runs.trainer(tmp_path, 8, 8, metrics=counted, unpack=count, options={"eval_strategy": "no"})
    assert "eval_tangent/SumMetric" in run.evaluate()
    assert "test_tangent/SumMetric" not in run.predict(runs.rows(8)).metrics
    several = run.evaluate({"easy": runs.rows(6), "difficult": runs.rows(10)})
    assert several["eval_easy_tangent/SumMetric"] == 6
    assert several["eval_difficult_tangent/SumMetric"] == 10
    run = runs.trainer(tmp_path, 8, 18, metrics=counted, unpack=count, max_batches=2, reset=False, prefix="along")
    run.train()
    assert [seen["eval_along/SumMetric"] for seen in run.reported.seen] == [8, 16]


def test_transformers_mixin_serves_other_trainers(runs, tmp_path):
    from transformers import Trainer

    from alignreg.callbacks.transformers import TangentMixin

    class Other(Trainer):
        def compute_loss(self, *args, **kwargs):
            self.called = True
            return super().compute_loss(*args, **kwargs)

    class Mine(TangentMixin, Other):
        pass

    run = runs.trainer(tmp_path, 8, 8, kind=Mine, metrics=counted, unpack=count, options={"eval_strategy": "no"})
    assert run.evaluate()["eval_tangent/SumMetric"] == 8
    assert run.called


def test_path_is_followed(runs, tmp_path):
    values = runs.Values()
    monitor = runs.TangentMonitor(PathComplexity, max_batches=1, reset=False)
    runs.lightning_trainer(tmp_path, monitor, values, max_epochs=3).fit(runs.Module(), runs.loader(8), runs.loader(8))
    lengths = [seen["tangent/PathComplexity"] for seen in values.seen]
    assert lengths[0] == 0 < lengths[1] < lengths[2]


@pytest.mark.parametrize("what", ["weights", "targets"])
def test_undefined_is_not_a_number(runs, tmp_path, what):
    x, y = data(8, 0)
    if what == "targets":
        y = torch.zeros_like(y)
    values, module, model = runs.Values(), runs.Module(), Keywords()
    for net in (module.net, model.net):
        if what == "weights":
            nn.init.constant_(net[0].weight, torch.nan)
    trainer = runs.lightning_trainer(tmp_path, runs.TangentMonitor(runs.metrics), values)
    with pytest.warns(UserWarning, match="logged as NaN"):
        trainer.validate(module, runs.loader_of(x, y), verbose=False)
    assert values.seen[0]["tangent/TangentAlignment"] != values.seen[0]["tangent/TangentAlignment"]
    run = runs.trainer(tmp_path, 8, 8, model=model, metrics=runs.watched, options={"eval_strategy": "no"})
    with pytest.warns(UserWarning, match="logged as NaN"):
        found = run.evaluate([{"pixels": row, "labels": int(label)} for row, label in zip(x, y, strict=True)])
    assert found["eval_tangent/TangentAlignment"] != found["eval_tangent/TangentAlignment"]


def test_undefined_on_one_rank_is_so_on_all(two_ranks):
    for found in two_ranks:
        tangents = {name: value for name, value in found["not a number"].items() if name.startswith("tangent/")}
        assert len(tangents) == 3
        assert all(value != value for value in tangents.values())


def test_errors(runs):
    metric = TangentAlignment(runs.Module(), 3)
    for make in (metric, 3):
        with pytest.raises(TypeError, match="a function of the model"):
            runs.TangentMonitor(make)
    with pytest.raises(ValueError, match="max_batches"):
        runs.TangentMonitor(runs.metrics, max_batches=0)
    monitor = runs.TangentMonitor(lambda _: 3)
    with pytest.raises(TypeError, match="got one that returns int"):
        monitor._monitor.start(runs.Module())
    for batch in ({"pixels": 1}, torch.ones(2), "xy", (1, 2, 3)):
        with pytest.raises(TypeError, match="Pass unpack"):
            unpack_batch(batch)


def test_documented_code_runs(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(python_blocks(PAGE)) == 3
    run_blocks(PAGE)
