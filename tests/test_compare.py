"""The comparison of regularizers: what is run, how weights are chosen, and what the numbers are made into."""

import dataclasses
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import types

import oracles
import pytest
import torch
from recipe_runs import RECIPES, read
from test_recipes_alike import _forget
from torch import nn
from torch.nn.functional import cross_entropy

TINY = "--tasks few100 --networks mlp --seeds 2 --tuning_seeds 1 --steps 6 --hidden 8 --kernel_size 10"


@pytest.fixture(autouse=True)
def _recipes_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    yield
    _forget()


def module(name):
    return importlib.import_module(name)


def plan(**values):
    options = {
        "command": "",
        "tasks": ["noise40", "few100"],
        "networks": ["mlp", "cnn"],
        "methods": list(module("_methods").METHODS),
        "further": [],
        "versions": {},
    }
    options = {**options, **values}
    grids = {name: list(module("_methods").KNOWN[name].weights) for name in options["methods"]}
    return module("_plan").Plan(**{"grids": grids, **options})


def row(method, on_top=False):
    return module("_plan").Row(method, on_top)


# What is run.


def test_every_method_is_tuned_alike():
    methods = module("_methods")
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
    for folder, flags in jobs:
        config = module("_flags").parse(module("train").Config, None, flags)[0]
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
    assert module("_plan").Plan.load(tmp_path) == a
    with pytest.raises(ValueError, match="expected the folder of a comparison"):
        module("_plan").Plan.load(tmp_path / "none")


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
        for folder, flags in jobs:
            _, _, name, weight, seed = folder.relative_to(tmp_path).parts
            order.append((name, flags))
            # The best by mean only; a larger one is equal; test accuracy points elsewhere.
            good = float(weight) == best[name] or float(weight) == max(a.grid(row(name.split("+")[0])))
            value = 0.5 + 0.1 * good + (0.2 if seed == "seed-0" else -0.2)
            folder.mkdir(parents=True)
            lines = [{"step": 0, "val/accuracy": 1.0}, {"step": 6, "val/accuracy": value, "test/accuracy": 1 - value}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    chosen = compare._choose(a, tmp_path, types.SimpleNamespace(run=run_all))["few100-mlp"]
    assert {r.slug: weight for r, weight in chosen.items()} == best
    on_top = [flags for name, flags in order if name == "alignment+weight_decay"]
    assert len(on_top) == 10
    assert all("--weight_decay 0.01 " in " ".join(flags) for flags in on_top)


# What it trains with.


def test_fisher_penalty_is_unbiased_and_its_gradient_that_of_its_value():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(12, 4, dtype=torch.float64)
    p = net(x).softmax(1).detach()
    jac = oracles.matrix(oracles.jacobian(net, x)).reshape(12, 3, -1)
    scores = jac - (p[:, :, None] * jac).sum(1, keepdim=True)  # ∇ log p_k = ∇ f_k − Σ_j p_j ∇ f_j
    trace = float((p * scores.square().sum(2)).sum(1).mean())
    kind = module("_fisher").FisherPenalty
    reg = kind(net, weight=1.0, examples=None, every_n_steps=1, seed=3)
    with torch.no_grad():
        values = torch.stack([reg(x) for _ in range(600)])
    assert abs(float(values.mean()) - trace) / float(values.std() / 600**0.5) < 3.5
    assert float(values.std()) > 0

    def value():
        return kind(net, weight=2.0, examples=None, every_n_steps=1, seed=5)(x)

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
    train = module("train")
    config = module("_flags").parse(train.Config, None, ["--cpu", "--measure=", "--hidden", "8", *flags])[0]
    recipe = train.Train(config)
    return recipe, module("_loop").prepare(recipe)


def test_label_smoothing():
    recipe, setup = prepared("--label_smoothing", "0.3")
    x, y = setup.data.train_x[:20], setup.data.train_y[:20]
    logits = setup.model(x)
    target = 0.7 * oracles.one_hot(y, 10) + 0.03
    expected = -(target * logits.double().log_softmax(1)).sum(1).mean()
    assert float(recipe.loss(logits, x, y)) == pytest.approx(float(expected), rel=1e-6)


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
    recipe, setup = prepared("--regularizer", "alignment", "--weight", "0.2", *flags.split())
    data = setup.data
    x, y = data.train_x[100:140], data.train_y[100:140]
    logits = setup.model(x)
    own = module("train").AlignmentLoss(setup.model, **{"weight": 0.2, "examples": 32, "every_n_steps": 1, **options})
    seen = (data.train_x[:30], data.train_y[:30]) if "pool" in flags else (x, y)
    expected = cross_entropy(logits, y) + own(*seen)
    assert float(recipe.loss(logits, x, y)) == pytest.approx(float(expected), rel=1e-6)


def test_a_regularizer_for_a_part_of_training():
    flags = "--regularizer complexity --weight 0.2 --steps 10 --reg_from 0.2 --reg_until 0.5"
    recipe, setup = prepared(*flags.split())
    x, y = setup.data.train_x[:40], setup.data.train_y[:40]
    logits = setup.model(x)
    task = float(cross_entropy(logits, y))
    assert [float(recipe.loss(logits, x, y)) > task + 1e-4 for _ in range(10)] == [2 <= step < 5 for step in range(10)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--regularizer fisher --weight 1 --reg_per_layer", "expected a regularizer of the kernel, got fisher"),
        ("--regularizer kare --weight 1 --reg_probes 3", "expected a regularizer of probes, got kare"),
    ],
)
def test_options_that_a_regularizer_does_not_have(flags, message, capsys):
    with pytest.raises(SystemExit):
        prepared(*flags.split())
    assert message in capsys.readouterr().err


def test_costs_are_those_of_steps(monkeypatch):
    monkeypatch.setattr(module("_cost"), "STEPS", 6)
    configs = {
        name: module("_flags").parse(module("train").Config, None, f"--cpu --measure= {flags}".split())[0]
        for name, flags in {"none": "", "much": "--regularizer kare --reg_examples 32 --weight 1"}.items()
    }
    threads = torch.get_num_threads()
    costs = module("_cost").of(configs, jobs=2)
    assert torch.get_num_threads() == threads
    assert 2 * costs["none"]["step"] < costs["much"]["step"] < 1
    assert all(value >= 0 for cost in costs.values() for value in cost.values())
    # Of a clock by which everything takes three seconds: a step is a sixth of a round.
    monkeypatch.setattr(module("_cost"), "_seconds", lambda work: work() or 3.0)
    monkeypatch.setattr(module("_cost").train.Train, "measure", lambda *_: None)
    costs = module("_cost").of(configs, jobs=2)
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


# What the numbers are made into.


def test_intervals():
    interval = module("_comparison").interval
    values = [0.1, 0.2, 0.4, 0.1, 0.3, 0.2, 0.5, 0.1, 0.2, 0.3]
    error = statistics.stdev(values) / 10**0.5
    # Student's t with nine degrees of freedom: quantiles .975 and 1 − .025/5 from a printed table.
    for comparisons, quantile in ((1, 2.262157), (5, 3.249836)):
        found = interval(values, comparisons)
        assert found.mean == pytest.approx(0.24)
        assert (found.low, found.high) == (
            pytest.approx(0.24 - quantile * error, rel=1e-5),
            pytest.approx(0.24 + quantile * error, rel=1e-5),
        )
    assert [interval(v).sign for v in ([1.0, 2.1], [-1.0, -2.1], [1.0, -1.0])] == [0, 0, 0]
    assert [interval(v).sign for v in ([1.0, 1.1, 1.2], [-1.0, -1.1, -1.2])] == [1, -1]
    assert str(interval([0.1, 0.1])) == "+0.100 [+0.100, +0.100]"


def log(alignments, last=0.5):
    return [
        {
            "step": step,
            "val/accuracy": [0.2, 0.6, 0.6, 0.1][step],
            "test/accuracy": [0.1, 0.7, 0.8, last][step],
            "train/accuracy": 1.0,
            "test/kernel_alignment": value,
            "train/effective_rank": 100.0 - 10 * step,
            "train/path_complexity": math.nan if step == 0 else 5.0 * step,
        }
        for step, value in enumerate(alignments)
    ]


def test_what_runs_reached():
    without, weak = log([0.1, 0.3, 0.2, 0.2]), log([0.1, 0.2, 0.2, 0.2], last=0.4)
    strong = log([0.1, 0.2, 0.4, 0.4])
    found = module("_comparison").reached([strong, weak], [without, without])
    assert found["test"] == [0.5, 0.4]
    assert found["early_stopped"] == [0.7, 0.7]
    assert found["alignment"] == [0.4, 0.2]
    assert found["path_complexity"] == [15, 15]
    assert found["rank_at_peak"] == [85, None]
    assert found["path_at_peak"] == [7.5, None]
    assert module("_comparison").reached([without], [without])["rank_at_peak"] == [90]


def found(values, weights=(0.1, 0.2, 0.4)):
    """A comparison of one setting, test accuracies by method."""
    rows = [
        {
            "method": name.removesuffix("+"),
            "on_top": name.endswith("+"),
            "weight": None if name == "none" else weights[1],
            "validation": {} if name == "none" else {f"{weight:g}": 0.5 for weight in weights},
            "cost": 1.5,
            "broken_off": 0,
            "values": {
                "test": test,
                "train": test,
                "early_stopped": test,
                "alignment": test,
                "effective_rank": test,
                "path_complexity": test,
                "rank_at_peak": [2 * test[0], None, 2 * test[2]],
                "path_at_peak": [2 * test[0], None, 2 * test[2]],
            },
        }
        for name, test in values.items()
    ]
    setting = {"setting": "few100-mlp", "flags": "--train_size 100", "rows": rows}
    run = {"command": "python recipes/compare.py", "machine": "2 cores", "versions": {"torch": "2"}}
    return {**run, "minutes": 90.0, "runs": 42, "seeds": 3, "tuning_seeds": 2, "settings": [setting]}


def test_tables_and_findings():
    comparison = module("_comparison")
    base = [0.500, 0.510, 0.520]

    def moved(*by):
        return [value + shift for value, shift in zip(base, by, strict=True)]

    a = found(
        {
            "none": base,
            "weight_decay": moved(0.1, 0.1001, 0.1),
            "alignment": moved(0.3, 0.3001, 0.3),
            "kare": moved(-0.2, -0.2, -0.2001),
            "alignment+": moved(0.1, -0.1, 0.2),
        }
    )
    lines = comparison.short_table(a).splitlines()
    assert lines[2:] == [
        "| none | .510 | 1.5x |",
        r"| weight decay | .610\* | 1.5x |",
        r"| alignment | **.810**\* | 1.5x |",
        "| KARE | .310† | 1.5x |",
        "| alignment + weight decay | .577 | 1.5x |",
    ]
    table = comparison.full_table(a)
    assert "| alignment | 0.2 | 0.810 ± 0.025 | **+0.300 [+0.300, +0.300]** | **+0.200 [+0.200, +0.200]** |" in table
    assert "−0.200 [−0.200, −0.200] | −0.300" in next(line for line in table.splitlines() if line.startswith("| KARE"))
    said = comparison.findings(a)
    assert (
        "- **alignment**: above none in 1 of 1 (few100-mlp +0.300 [+0.300, +0.300]); above tuned weight decay" in said
    )
    assert "- **KARE**: below none in 1 of 1" in said
    assert "- **alignment + weight decay**: not settled against tuned weight decay in 1 of 1." in said
    assert "- Highest mean: few100-mlp alignment 0.810.\n" in said
    assert "- 3 seeds: a look, and no evidence.\n" in said
    assert "evidence" not in comparison.findings({**a, "seeds": 8})
    assert "At the largest" not in said
    assert "At the smallest, nearest to none: 0 of 4 choices." in said
    a["settings"][0]["rows"][2]["weight"] = 0.4
    assert "may lie beyond: few100-mlp alignment 0.4." in comparison.findings(a)
    a["settings"][0]["rows"][3]["weight"] = 0.1
    assert "At the smallest, nearest to none: 1 of 4 choices." in comparison.findings(a)
    # Of the four differences to none all at once: Bonferroni, by hand for alignment with weight decay.
    difference = comparison.against(a["settings"][0], a["settings"][0]["rows"][4], "none")
    shifts = [0.1, -0.1, 0.2]
    half = 8.8602 * statistics.stdev(shifts) / 3**0.5  # t with two degrees of freedom at 1 − .025/4
    assert difference.high - difference.mean == pytest.approx(half, rel=1e-4)
    # Label smoothing is a third to stand beside, of what is not on top of weight decay.
    extra = {**a["settings"][0]["rows"][2], "method": "label_smoothing", "weight": 0.2}
    a["settings"][0]["rows"].insert(2, extra)
    assert "not settled against label smoothing in 1 of 1" in comparison.findings(a)
    assert comparison.findings(a).count("label smoothing in 1 of 1") == 3
    assert "− label smoothing |" in comparison.full_table(a)
    del a["settings"][0]["rows"][2]
    alike = comparison.alike(a).splitlines()
    assert alike[2].startswith("| few100-mlp | 1.59 [")
    assert "| 2 of 3 | 1.59 [" in alike[2]
    assert comparison.run(a) == (
        "`python recipes/compare.py`: 42 runs, 3 seeds that count, 1.5 hours on 2 cores; torch 2.\n"
    )


def test_runs_that_collapsed_and_other_tables():
    comparison = module("_comparison")
    a = found({"none": [0.5, 0.52, 0.51], "weight_decay": [0.6, 0.1, 0.62], "kare": [0.5, 0.52, 0.51]})
    rows = a["settings"][0]["rows"]
    rows[2]["values"]["early_stopped"] = [0.8, 0.82, 0.81]
    lines = comparison.short_table(a).splitlines()
    assert lines[3] == "| weight decay | .440‡ | 1.5x |"
    assert lines[4] == "| KARE | .510 | 1.5x |"
    assert r"| KARE | .810\* |" in comparison.early_table(a)
    told = "Runs of 3 that ended below half of none's mean accuracy: few100-mlp weight decay 1."
    assert told in comparison.findings(a)
    assert comparison.weights(a).splitlines()[2:] == [
        "| weight decay | 0.1, 0.2, 0.4 | 0.2 |",
        "| KARE | 0.1, 0.2, 0.4 | 0.2 |",
    ]


def test_a_variant_stands_beside_its_default():
    comparison = module("_comparison")
    same = [0.5, 0.52, 0.51]
    a = found({"none": same, "weight_decay": same, "alignment": same, "alignment:per_layer": [v + 0.1 for v in same]})
    line = next(line for line in comparison.full_table(a).splitlines() if line.startswith("| alignment: per layer"))
    assert line.count("**+0.100 [+0.100, +0.100]**") == 3
    assert "above its default in 1 of 1" in comparison.findings(a)


def test_blocks_of_a_text():
    comparison = module("_comparison")
    same = [0.5, 0.52, 0.51]
    a = found({"none": same, "weight_decay": same, "alignment": same})
    text = "a\n<!-- comparison: run -->\nold\nlines\n<!-- end -->\nb\n<!-- comparison: short table -->\n<!-- end -->\n"
    new = comparison.filled(text, a)
    assert new.startswith("a\n<!-- comparison: run -->\n`python recipes/compare.py`: 42 runs")
    assert "old" not in new
    assert f"short table -->\n{comparison.short_table(a)}<!-- end -->\n" in new
    assert comparison.filled(new, a) == new
    with pytest.raises(ValueError, match=r"expected a mark of one of short table, .*, got nothing"):
        comparison.filled("<!-- comparison: nothing -->\n<!-- end -->", a)


# From its command.


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
    assert "8 of 8 runs of fresh seeds to do" in said
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
    assert "4 of 12 runs of fresh seeds to do" in said
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
        (["--output_dir", folder], "holds something"),
        (["--resume", tmp_path], "expected the folder of a comparison"),
        (["--resume", folder, "--steps", 7], "expected no further flags"),
        (["--resume", folder, "--seeds", 1], "expected at least the 3 of the comparison, got 1"),
        (["--report", tmp_path], "expected the folder of a comparison that is done, or its json"),
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
        ("--val_size 0", "--val_size: expected a number of examples to hold out"),
        ("--dataset mnist --data_path nowhere --methods none,weight_decay", "expected a folder"),
        ("--config some.yaml --networks mlp", "expected the network of the configuration alone"),
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
    a = plan(networks=[], further=["--config", str(file)], methods=list(module("_methods").KNOWN))
    assert list(a.settings) == a.tasks
    for setting in a.settings:
        for name in a.methods:
            config = a.config(setting, row(name))
            assert config.val_size > 0
            assert config.dataset in file.stem.replace("-", "_")


def test_failures_are_said(tmp_path, monkeypatch):
    jobs = module("_jobs")
    monkeypatch.setattr(jobs._loop, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("out of luck")))
    said = jobs._train(tmp_path / "run", ["--cpu"])
    assert "train.py failed" in said
    assert "out of luck" in said
    assert not jobs.done(tmp_path / "run")
    said = jobs._train(tmp_path / "run", ["--cpu", "--depth", "1"])
    assert "expected at least 2 layers" in said


def test_runs_that_diverge_end_by_themselves(tmp_path, monkeypatch):
    """With a learning rate far too large, the tangent features of the measurements are no numbers."""
    jobs, comparison, folder = module("_jobs"), module("_comparison"), tmp_path / "run"
    text = "--cpu --lr 1e30 --steps 30 --hidden 8 --val_size 100 --measure held_out --kernel_size 10"
    flags = text.split()
    assert "train.py failed" in jobs._train(folder, flags)
    assert not jobs.done(folder)
    assert jobs._train(folder, flags, may_break_off=True) is None
    assert jobs.done(folder)
    assert jobs.broken_off(folder)
    assert "contain NaN" in (folder / jobs.BROKEN_OFF).read_text()
    log = comparison.log_of(folder)
    assert log[:-1] == read(folder)
    assert log[-1]["val/accuracy"] == log[-1]["test/accuracy"] == 0
    assert math.isnan(log[-1]["test/kernel_alignment"])
    # Wrong flags, and what is no divergence, still stop a study.
    assert "invalid float value" in jobs._train(tmp_path / "other", [*flags, "--lr", "x"], may_break_off=True)
    monkeypatch.setattr(jobs._loop, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("out of luck")))
    assert "out of luck" in jobs._train(tmp_path / "other", flags, may_break_off=True)

    same = [0.5, 0.52, 0.51]
    a = found({"none": same, "weight_decay": same, "alignment": same})
    assert "broke off" not in comparison.findings(a)
    a["settings"][0]["rows"][2] |= {"broken_off": 2}
    assert "counted with an accuracy of zero: few100-mlp alignment 2." in comparison.findings(a)


def test_no_process_is_left_by_failures(tmp_path, capsys):
    jobs = [
        (tmp_path / str(index), ["--cpu", "--dataset", "mnist", "--data_path", str(tmp_path)]) for index in range(3)
    ]
    with pytest.raises(SystemExit, match=r"train\.py failed"):
        module("_jobs").Workers(2, tmp_path).run(jobs)
    assert "3 of 3 runs to do" in capsys.readouterr().out
    assert not list(tmp_path.glob("*/done"))
    assert not module("multiprocessing").active_children()
