"""The comparison of regularizers: what is run, how weights are chosen, and its command."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import types

import pytest
import torch
from paths import RECIPES
from recipe_runs import module, parse, plan, read, row

pytestmark = pytest.mark.usefixtures("recipes_in_this_process")
TINY = "--tasks few100 --networks mlp --seeds 2 --tuning_seeds 1 --steps 6 --hidden 8 --kernel_size 10"


def test_every_method_is_tuned_alike():
    methods = module("comparison.methods")
    sizes = {name: len(method.weights) for name, method in methods.KNOWN.items() if name != methods.NONE}
    assert set(sizes.values()) == {5}
    for method in methods.KNOWN.values():
        assert list(method.weights) == sorted(method.weights)
    a = plan(methods=list(methods.KNOWN))
    base = {"weight_decay": 0.0, "label_smoothing": 0.0, "regularizer": "none", "weight": 0.0}
    configs = {name: a.config("noise40-mlp", row(name)) for name in methods.KNOWN}
    for name, config in configs.items():
        assert (config.val_size, config.steps, config.label_noise, config.model) == (300, 1000, 0.4, "mlp")
        changed = {key for key, value in base.items() if getattr(config, key) != value}
        alone = name if name in ("weight_decay", "label_smoothing") else None
        assert changed == (set() if name == "none" else {alone} if alone else {"regularizer", "weight"})
    every = [tuple(sorted(dataclasses.asdict(config).items(), key=str)) for config in configs.values()]
    assert len(set(every)) == len(every)  # no variant is another one


def test_runs_of_a_plan(tmp_path):
    a = plan(seeds=4, tuning_seeds=2)
    assert [r.method for r in a.rows if r.on_top] == a.methods[2:]
    jobs = []
    for setting in a.settings:
        chosen = {r: a.grid(r)[1] for r in a.rows if a.grid(r)}
        for r in a.rows:
            jobs += [job for w in a.grid(r) for job in a.tuning(tmp_path, setting, r, w, chosen)]
            jobs += a.final(tmp_path, setting, r, chosen)
    assert len(jobs) == a.runs == 4 * ((7 + 6) * 5 * 2 + (8 + 6) * 4)
    assert len({folder for folder, _ in jobs}) == len(jobs)
    seeds = {"tune": set(), "final": set()}
    for folder, config in jobs:
        stage = folder.relative_to(tmp_path).parts[1]
        seeds[stage].add(config.seed)
        assert config.measures == (() if stage == "tune" else ("held_out", "ranks", "path"))
        name = folder.relative_to(tmp_path).parts[2]
        expected = 0.003 if name.endswith("+weight_decay") else config.weight_decay
        assert config.weight_decay == expected
    assert seeds["tune"] == {0, 1}
    assert len(seeds["final"]) == 4
    assert not seeds["tune"] & seeds["final"]


def test_a_plan_is_kept(tmp_path):
    a = plan(costs={"few100-mlp": {"none": {"step": 1e-3, "measure": 0.1, "start": 0.0}}}, minutes=1.5)
    a.save(tmp_path)
    assert module("comparison.plan").Plan.load(tmp_path) == a
    with pytest.raises(ValueError, match="expected the folder of a comparison"):
        module("comparison.plan").Plan.load(tmp_path / "none")


def test_minutes_before_it_starts():
    costs = {"step": 1e-3, "measure": 0.5, "start": 2.0}
    a = plan(tasks=["few100"], networks=["mlp"], methods=["none", "weight_decay"], seeds=4, tuning_seeds=2)
    a.costs = {"few100-mlp": {"none": costs, "weight_decay": {**costs, "step": 3e-3}}}
    # Lines at 0, 5, 10, ... 640 and 1000.
    expected = 4 * (1 + 2) + 14 * (3 + 2) + 2 * 4 * 10 * 0.5
    assert a.estimated_minutes(2) == pytest.approx(expected / 60 / 2)


def test_weights_follow_from_validation_alone(tmp_path):
    compare = module("compare")
    a = plan(tasks=["few100"], networks=["mlp"], methods=["none", "weight_decay", "alignment"], tuning_seeds=2)
    best = {"weight_decay": 0.01, "alignment": 0.2, "alignment+weight_decay": 0.4}
    order = []

    def run_all(jobs, *_, **__):
        for folder, config in jobs:
            _, _, name, weight, seed = folder.relative_to(tmp_path).parts
            order.append((name, config))
            # The best by mean only; a larger one is equal; test accuracy points elsewhere.
            good = float(weight) == best[name] or float(weight) == max(a.grid(row(name.split("+")[0])))
            value = 0.5 + 0.1 * good + (0.2 if seed == "seed-0" else -0.2)
            folder.mkdir(parents=True)
            lines = [{"step": 0, "val/accuracy": 1.0}, {"step": 6, "val/accuracy": value, "test/accuracy": 1 - value}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    chosen = compare._choose(a, tmp_path, types.SimpleNamespace(run=run_all))["few100-mlp"]
    assert {r.slug: weight for r, weight in chosen.items()} == best
    on_top = [config for name, config in order if name == "alignment+weight_decay"]
    assert len(on_top) == 10
    assert all(config.weight_decay == 0.01 for config in on_top)


def test_costs_are_those_of_steps(monkeypatch):
    monkeypatch.setattr(module("comparison.cost"), "STEPS", 6)
    configs = {
        name: parse(f"--cpu --measure= {flags}".split())[0]
        for name, flags in {"none": "", "much": "--regularizer kare --reg_examples 32 --weight 1"}.items()
    }
    threads = torch.get_num_threads()
    costs = module("comparison.cost").of(configs, jobs=2)
    assert torch.get_num_threads() == threads
    assert costs.keys() == configs.keys()
    # Of a clock by which everything takes three seconds: a step is a sixth of a round.
    monkeypatch.setattr(module("comparison.cost"), "_seconds", lambda work: work() or 3.0)
    monkeypatch.setattr(module("training.loop").Measurements, "__call__", lambda *_: None)
    costs = module("comparison.cost").of(configs, jobs=2)
    assert {(cost["step"], cost["measure"]) for cost in costs.values()} == {(0.5, 3.0)}


def test_a_short_look(monkeypatch):
    """Two weights a method, from the middle up; flags that change nothing are not told."""
    compare = module("compare")
    flags = ["--short", "--jobs", "1", "--output_dir=here", "--hidden", "8"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
    a = compare._new(*compare._parser().parse_known_args(flags))
    assert a.grid(row("weight_decay")) == [0.01, 0.02]
    assert a.grid(row("complexity")) == [0.016, 0.032]
    assert a.grid(row("none")) == []
    assert a.runs == 2 * 2 + 3 * 3
    assert a.config("noise40-mlp", row("none")).hidden == 8
    assert a.command == "python recipes/compare.py --short --hidden 8"


def test_a_comparison_from_its_command_and_on(tmp_path, monkeypatch, capsys):
    compare, folder = module("compare"), tmp_path / "comparison"

    def call(*flags):
        """As from the command line; what it prints, or says where it refuses."""
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, flags), "--jobs", "2"])
        try:
            compare.main()
        except SystemExit as stop:
            return str(stop.code)
        return capsys.readouterr().out

    flags = [*TINY.split(), "--methods", "none,weight_decay,alignment"]
    said = call(*flags, "--output_dir", folder)
    assert "23 runs, about" in said
    assert said.index("23 runs") < said.index("10 of 10 runs to choose weights to do")
    assert "5 of 5 runs to choose weights on top of weight decay to do" in said
    assert "8 of 8 runs with fresh seeds to do" in said
    names = {path.name for path in folder.iterdir()}
    outcomes = {"comparison.json", "table.md", "findings.md", "paths.png", "explicit.png"}
    assert names == {"plan.json", "few100-mlp", *outcomes}
    found = json.loads((folder / "comparison.json").read_text())
    assert found["command"] == "python recipes/compare.py " + " ".join(flags)
    rows = found["settings"][0]["rows"]
    assert [(r["method"], r["on_top"]) for r in rows] == [
        ("none", False),
        ("weight_decay", False),
        ("alignment", False),
        ("alignment", True),
    ]
    for r in rows:
        slug = r["method"] + ("+weight_decay" if r["on_top"] else "")
        logs = [read(folder / "few100-mlp" / "final" / slug / f"seed-{seed}") for seed in range(2)]
        assert r["values"]["test"] == [pytest.approx(lines[-1]["test/accuracy"], abs=1e-5) for lines in logs]
        if r["weight"] is not None:
            assert r["validation"][f"{r['weight']:g}"] == max(r["validation"].values())
    assert (folder / "table.md").read_text() in said

    # A run in a process that had others before is the one of a process of its own.
    own, again = folder / "few100-mlp" / "final" / "alignment" / "seed-1", tmp_path / "again"
    one = [sys.executable, RECIPES / "train.py", "--config", own / "config.json", "--output_dir", again]
    subprocess.run(
        one,
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))},
    )
    assert (again / "metrics.jsonl").read_bytes() == (own / "metrics.jsonl").read_bytes()

    # A run that was killed before it was done, and one seed more.
    (folder / "few100-mlp/tune/alignment/0.1/seed-0/done").unlink()
    said = call("--resume", folder, "--seeds", 3)
    assert "1 of 10 runs to choose weights to do" in said
    assert "4 of 12 runs with fresh seeds to do" in said
    longer = json.loads((folder / "comparison.json").read_text())
    assert longer["seeds"] == 3
    assert longer["minutes"] >= found["minutes"]
    for old, new in zip(rows, longer["settings"][0]["rows"], strict=True):
        assert new["values"]["test"][:2] == old["values"]["test"]

    text = tmp_path / "text.md"
    text.write_text("<!-- comparison: full table -->\n<!-- end -->\n")
    call("--report", folder / "comparison.json", "--into", text)
    assert (folder / "table.md").read_text() in text.read_text()

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for wrong, message in (
        (["--output_dir", folder], "is not empty"),
        (["--resume", tmp_path], "expected the folder of a comparison"),
        (["--resume", folder, "--steps", 7], "expected no other flags"),
        (["--resume", folder, "--seeds", 1], "expected at least the 3 of the comparison, got 1"),
        (["--report", tmp_path], "expected the folder of a finished comparison, or its json"),
    ):
        assert message in call(*wrong)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--methods none,alignment", "expected none and weight_decay among them"),
        ("--methods none,weight_decay,dropout", "got dropout"),
        ("--tasks few10", "--tasks: expected some of noise40, noise20, few100, few300, got few10"),
        ("--seeds 1", "expected at least 2"),
        ("--seed 3", "expected --seeds and --tuning_seeds"),
        ("--val_size 0", "--val_size: expected a number of validation examples"),
        ("--dataset mnist --data_path nowhere --methods none,weight_decay", "expected a folder"),
        ("--config some.yaml --networks mlp", "expected no such flag with --config"),
        ("--hidden x", "invalid int value: 'x'"),
        ("--hiden 8", "unrecognized arguments: --hiden"),
    ],
)
def test_wrong_flags_before_there_is_a_folder(flags, message, tmp_path, monkeypatch, capsys):
    compare = module("compare")
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags.split(), "--output_dir", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as stop:
        compare.main()
    assert message in f"{capsys.readouterr().err} {stop.value}"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("file", sorted((RECIPES / "configs" / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_have_what_a_comparison_needs(file):
    a = plan(networks=[], further=["--config", str(file)], methods=list(module("comparison.methods").KNOWN))
    assert list(a.settings) == a.tasks
    for setting in a.settings:
        for name in a.methods:
            config = a.config(setting, row(name))
            assert config.val_size > 0
            assert config.dataset in file.stem.replace("-", "_")


def test_failures_are_said(tmp_path, monkeypatch):
    jobs = module("studies.jobs")
    monkeypatch.setattr(jobs.loop, "train", lambda *_: (_ for _ in ()).throw(RuntimeError("out of luck")))
    config, _ = parse(["--cpu"])
    said = jobs._train(tmp_path / "run", config)
    assert "train.py failed" in said
    assert "out of luck" in said
    assert not jobs.done(tmp_path / "run")


def test_runs_that_diverge_end_by_themselves(tmp_path, monkeypatch):
    """With a learning rate far too large, the tangent features of the measurements are no numbers."""
    jobs, comparison, folder = module("studies.jobs"), module("comparison.report"), tmp_path / "run"
    text = "--cpu --lr 1e30 --steps 30 --hidden 8 --val_size 100 --measure held_out --kernel_size 10"
    config, _ = parse(text.split())
    assert "train.py failed" in jobs._train(folder, config)
    assert not jobs.done(folder)
    assert jobs._train(folder, config, may_break_off=True) is None
    assert jobs.done(folder)
    assert jobs.broken_off(folder)
    assert "contain NaN" in (folder / jobs.BROKEN_OFF).read_text()
    log = comparison.log_of(folder)
    assert log[:-1] == read(folder)
    assert log[-1]["val/accuracy"] == log[-1]["test/accuracy"] == 0
    assert math.isnan(log[-1]["test/kernel_alignment"])
    # Wrong flags, and what is no divergence, still stop a study.
    nowhere = dataclasses.replace(config, dataset="mnist", data_path=str(tmp_path / "nowhere"))
    assert "No such folder" in jobs._train(tmp_path / "other", nowhere, may_break_off=True)
    monkeypatch.setattr(jobs.loop, "train", lambda *_: (_ for _ in ()).throw(RuntimeError("out of luck")))
    assert "out of luck" in jobs._train(tmp_path / "other", config, may_break_off=True)


def test_no_process_is_left_by_failures(tmp_path, capsys):
    config, _ = parse(["--cpu", "--dataset", "mnist", "--data_path", str(tmp_path)])
    jobs = [(tmp_path / str(index), config) for index in range(3)]
    with pytest.raises(SystemExit, match=r"train\.py failed"):
        module("studies.jobs").Workers(2, tmp_path).run(jobs)
    assert "3 of 3 runs to do" in capsys.readouterr().out
    assert not list(tmp_path.glob("*/done"))
    assert not module("multiprocessing").active_children()
