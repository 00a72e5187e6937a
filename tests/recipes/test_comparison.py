"""What a comparison makes of its numbers: intervals, tables, findings."""

import math
import statistics

import pytest
from recipe_runs import module

pytestmark = pytest.mark.usefixtures("recipes_in_this_process")


def test_intervals():
    interval = module("comparison.report").interval
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
    found = module("comparison.report").reached([strong, weak], [without, without])
    assert found["test"] == [0.5, 0.4]
    assert found["early_stopped"] == [0.7, 0.7]
    assert found["alignment"] == [0.4, 0.2]
    assert found["path_complexity"] == [15, 15]
    assert found["rank_at_peak"] == [85, None]
    assert found["path_at_peak"] == [7.5, None]
    assert module("comparison.report").reached([without], [without])["rank_at_peak"] == [90]


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
    comparison = module("comparison.report")
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
    assert "- **alignment + weight decay**: no significant difference from tuned weight decay in 1 of 1." in said
    assert "- The highest means are: few100-mlp alignment 0.810.\n" in said
    assert "- With 3 seeds this is a quick look, not evidence.\n" in said
    assert "evidence" not in comparison.findings({**a, "seeds": 8})
    assert "At the largest" not in said
    assert "At the smallest weight of their grids: 0 of 4 choices." in said
    a["settings"][0]["rows"][2]["weight"] = 0.4
    assert "may be better: few100-mlp alignment 0.4." in comparison.findings(a)
    a["settings"][0]["rows"][3]["weight"] = 0.1
    assert "At the smallest weight of their grids: 1 of 4 choices." in comparison.findings(a)
    # Of the four differences to none all at once: Bonferroni, by hand for alignment with weight decay.
    difference = comparison.against(a["settings"][0], a["settings"][0]["rows"][4], "none")
    shifts = [0.1, -0.1, 0.2]
    half = 8.8602 * statistics.stdev(shifts) / 3**0.5  # t with two degrees of freedom at 1 − .025/4
    assert difference.high - difference.mean == pytest.approx(half, rel=1e-4)
    # Label smoothing is a third to stand beside, of what is not on top of weight decay.
    extra = {**a["settings"][0]["rows"][2], "method": "label_smoothing", "weight": 0.2}
    a["settings"][0]["rows"].insert(2, extra)
    assert "no significant difference from label smoothing in 1 of 1" in comparison.findings(a)
    assert comparison.findings(a).count("label smoothing in 1 of 1") == 3
    assert "− label smoothing |" in comparison.full_table(a)
    del a["settings"][0]["rows"][2]
    alike = comparison.alike(a).splitlines()
    assert alike[2].startswith("| few100-mlp | 1.59 [")
    assert "| 2 of 3 | 1.59 [" in alike[2]
    assert comparison.run(a) == (
        "`python recipes/compare.py`: 42 runs, 3 final seeds, 1.5 hours on 2 cores; torch 2.\n"
    )


def test_runs_that_collapsed_and_other_tables():
    comparison = module("comparison.report")
    a = found({"none": [0.5, 0.52, 0.51], "weight_decay": [0.6, 0.1, 0.62], "kare": [0.5, 0.52, 0.51]})
    rows = a["settings"][0]["rows"]
    rows[2]["values"]["early_stopped"] = [0.8, 0.82, 0.81]
    lines = comparison.short_table(a).splitlines()
    assert lines[3] == "| weight decay | .440‡ | 1.5x |"
    assert lines[4] == "| KARE | .510 | 1.5x |"
    assert r"| KARE | .810\* |" in comparison.early_table(a)
    told = "Of 3 runs each, some ended below half the mean accuracy without a regularizer: few100-mlp weight decay 1."
    assert told in comparison.findings(a)
    assert comparison.weights(a).splitlines()[2:] == [
        "| weight decay | 0.1, 0.2, 0.4 | 0.2 |",
        "| KARE | 0.1, 0.2, 0.4 | 0.2 |",
    ]


def test_a_variant_stands_beside_its_default():
    comparison = module("comparison.report")
    same = [0.5, 0.52, 0.51]
    a = found({"none": same, "weight_decay": same, "alignment": same, "alignment:per_layer": [v + 0.1 for v in same]})
    line = next(line for line in comparison.full_table(a).splitlines() if line.startswith("| alignment: per layer"))
    assert line.count("**+0.100 [+0.100, +0.100]**") == 3
    assert "above its default in 1 of 1" in comparison.findings(a)


def test_blocks_of_a_text():
    comparison = module("comparison.report")
    same = [0.5, 0.52, 0.51]
    a = found({"none": same, "weight_decay": same, "alignment": same})
    text = "a\n<!-- comparison: run -->\nold\nlines\n<!-- end -->\nb\n<!-- comparison: short table -->\n<!-- end -->\n"
    new = comparison.filled(text, a)
    assert new.startswith("a\n<!-- comparison: run -->\n`python recipes/compare.py`: 42 runs")
    assert "old" not in new
    assert f"short table -->\n{comparison.short_table(a)}<!-- end -->\n" in new
    assert comparison.filled(new, a) == new
    with pytest.raises(ValueError, match=r"expected a mark for one of short table, .*, got nothing"):
        comparison.filled("<!-- comparison: nothing -->\n<!-- end -->", a)


def test_runs_that_broke_off_are_told():
    comparison = module("comparison.report")
    same = [0.5, 0.52, 0.51]
    a = found({"none": same, "weight_decay": same, "alignment": same})
    assert "diverged" not in comparison.findings(a)
    a["settings"][0]["rows"][2] |= {"broken_off": 2}
    assert "count with an accuracy of zero: few100-mlp alignment 2." in comparison.findings(a)
