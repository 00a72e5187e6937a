"""The run on a GPU: what it writes and when it stops, with parts that stand in for the real ones."""

import json
import sys
import time

import pytest
from paths import ROOT

PART = """
import os, time
def run(device, small, budget, part):
    {body}
"""


@pytest.fixture
def gpu(monkeypatch):
    for folder in ("benchmarks", "docs"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    before = set(sys.modules)
    import gpu

    yield gpu
    for name in {"gpu", "_gpu", "_gpu_record", "_benchmarks"} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def parts(gpu, monkeypatch, tmp_path):
    """Runs of parts that are written in the test: ``parts(minutes, name=body)``."""

    def run(minutes, **bodies):
        for name, body in bodies.items():
            (tmp_path / f"_gpu_{name}.py").write_text(PART.format(body=body))
        program = (ROOT / "benchmarks" / "gpu.py").read_text()
        # The program itself but for torch, which takes seconds.
        start = program.index("def header(args)")
        end = program.index("def run_part")
        program = program[:start] + 'def header(args):\n    return {"device": args.device}\n\n\n' + program[end:]
        (tmp_path / "gpu.py").write_text(program)
        record = ROOT / "benchmarks" / "_gpu_record.py"
        (tmp_path / "_gpu_record.py").write_text(record.read_text())
        monkeypatch.setattr(gpu, "HERE", tmp_path)
        monkeypatch.setattr(gpu, "ROOT", tmp_path)
        path = tmp_path / "gpu.json"
        args = gpu.parse(["--device", "cpu", "--limit", str(minutes), "--json", str(path), "--parts", *bodies])
        failed = gpu.run(args)
        return failed, json.loads(path.read_text())

    return run


def test_parts_fail_alone(parts, capsys):
    """A check that fails, a crash and a hang are told, and cost the others nothing: their rows are there."""
    failed, found = parts(
        0.1,
        correct='part.check("right", 0.1, 0.2); part.check("wrong", float("nan"), 0.2); part.row(n=1)',
        kernel='part.row(n=1); raise MemoryError("all of it")',
        sketch="part.row(n=1); time.sleep(60)",
        losses='part.check("right", 0.0, 0.0); part.failed("raises", ValueError("no")) if small else None',
    )
    assert failed == ["correct", "kernel", "sketch"]
    assert [check["ok"] for check in found["correct"]["checks"]] == [True, False]
    assert found["kernel"]["status"].startswith("crashed (1): MemoryError: all of it")
    assert found["sketch"]["status"].startswith("stopped after")
    assert found["losses"]["status"].startswith("done")
    assert all(found[name]["rows"] == [{"n": 1}] for name in ("correct", "kernel", "sketch"))
    said = capsys.readouterr().out
    assert "WRONG  name wrong" in said
    assert "recipe" not in said


def test_exit_status(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "run", lambda args: ["kernel"])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small", "--json", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match="failed: kernel"):
        gpu.main()
    monkeypatch.setattr(gpu, "run", lambda args: [])
    gpu.main()


def test_time(gpu):
    """Shares of what is left, and no measurement that would not end."""
    record = gpu.record
    assert record.shares({"a": 3, "b": 1}, 80) == {"a": 60, "b": 20}
    budget = record.Budget(time.time() + 100)
    assert budget.allows(90)
    assert not budget.allows(110)
    assert record.Budget(time.time() - 5).left == 0


def test_rows_are_written_as_they_come_and_others_stay(gpu, tmp_path):
    path = tmp_path / "new" / "gpu.json"
    other, part = gpu.record.Record(path, "other"), gpu.record.Record(path, "kernel")
    for each in (other, part):
        each.start()
    other.row(n=3)
    part.row(n=4, seconds=0.5)
    part.update(status="done in 3 s", device="A card")
    found = json.loads(path.read_text())
    assert found["kernel"] == {
        "status": "done in 3 s",
        "checks": [],
        "rows": [{"n": 4, "seconds": 0.5}],
        "device": "A card",
    }
    assert found["other"]["rows"] == [{"n": 3}]
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]


def test_summary_is_short(gpu):
    rows = [{"network": f"net {i}", "n": n} for i in range(200) for n in (1, 2)]
    wrong = {"name": "w", "error": 1.0, "tolerance": 0.0, "ok": False}
    part = {"device": "A card", "status": "done in 3 s", "checks": [wrong], "rows": rows}
    lines = gpu.record.summary(dict.fromkeys(gpu.PARTS, part), list(gpu.PARTS))
    assert 50 < len(lines) <= 60
    assert "A card" in lines[0]
    assert sum("WRONG" in line for line in lines) == len(gpu.PARTS)
    assert not any("n 1" in line for line in lines)  # the last of its kind stands for all


def test_page(gpu, tmp_path):
    import _gpu

    page, source = tmp_path / "gpu.md", tmp_path / "gpu.json"
    _gpu.write(source, page)
    assert "None was run yet" in page.read_text()
    part = gpu.record.Record(source, "kernel")
    part.start(device="A card", torch="2.11.0", cuda=None)
    part.check("GPT is right", 1e-7, 1e-3)
    part.row(network="GPT", n=8, seconds=0.25)
    part.row(network="GPT", ratio=3.0)
    part.update(status="done in 3 s")
    _gpu.write(source, page)
    text = page.read_text()
    assert "None was run" not in text
    for said in (
        "device A card, torch 2.11.0, status done in 3 s",
        "1 of 1 checks",
        "| GPT | 8 | 0.25 |",
        "| GPT | 3 |",
    ):
        assert said in text
    assert text.count("Not run.") == 4
