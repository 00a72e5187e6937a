"""What all recipes have in common, tried on each."""

import ast
import json

import pytest
from paths import RECIPES
from recipe_runs import STUDIES, TINY, read, recipe

FILES = sorted(RECIPES.glob("*.py"))
NAMES = [path.stem for path in FILES if "loop.train(" in path.read_text()]
OTHERS = {"overlay", "supernat", "compare"}  # train no network, or have a test of their own
pytestmark = pytest.mark.usefixtures("recipes_in_this_process")
SMALL = {"train": "--regularizer complexity --weight 0.1"}


def test_every_recipe_is_of_a_kind():
    assert sorted([*NAMES, *OTHERS]) == [path.stem for path in FILES]


def test_rooms():
    """What is run lies at the top or among the studies, and nothing imports it; rooms are few, and know none above."""
    order = ["data", "training", "studies", "comparison"]
    assert sorted(path.name for path in RECIPES.iterdir() if path.name != "__pycache__") == sorted(
        [*order, "configs", *(path.name for path in FILES)]
    )
    leaves = {*(path.stem for path in FILES), *(f"studies.{name}" for name in STUDIES)}
    for path in RECIPES.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        assert not names & leaves, path
        room = path.parent.name
        if room in order:
            above = {name.partition(".")[0] for name in names} & set(order[order.index(room) + 1 :])
            assert not above, path


@pytest.mark.parametrize("name", NAMES)
def test_logs_seeds_and_resume_are_those_of_the_loop(name, monkeypatch, tmp_path, capsys):
    flags = [*TINY.split(), *SMALL.get(name, "").split()]
    folders = [tmp_path / part for part in ("one", "two", "parts")]
    for folder in folders[:2]:
        recipe(name, monkeypatch, *flags, "--output_dir", folder)
    one = (folders[0] / "metrics.jsonl").read_bytes()
    assert one == (folders[1] / "metrics.jsonl").read_bytes()
    made = json.loads((folders[0] / "config.json").read_text())
    assert {"config", "command", "made", "git", "versions"} == set(made)
    assert made["config"]["steps"] == 6
    assert {line["step"] for line in read(folders[0])} == {0, 5, 6}
    assert (folders[0] / "examples.safetensors").is_file()
    figures = [path for path in folders[0].iterdir() if path.suffix == ".png"]
    assert figures
    said = capsys.readouterr().out
    assert all(f"figure: {path}" in said for path in figures)
    assert f"log:    {folders[0] / 'metrics.jsonl'}" in said

    recipe(name, monkeypatch, *flags, "--max_steps", 3, "--output_dir", folders[2])
    assert one.startswith((folders[2] / "metrics.jsonl").read_bytes())
    recipe(name, monkeypatch, "--resume_from_checkpoint", folders[2])
    assert (folders[2] / "metrics.jsonl").read_bytes() == one

    before = {path: path.read_bytes() for path in folders[0].iterdir()}
    with pytest.raises(SystemExit, match="holds another run"):
        recipe(name, monkeypatch, *flags, "--output_dir", folders[0])
    assert {path: path.read_bytes() for path in folders[0].iterdir()} == before


@pytest.mark.parametrize("name", NAMES)
def test_launch_guard(name, monkeypatch, tmp_path):
    """As accelerate launch leaves the one process that it starts on CPUs in place of several."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for key, value in {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(RuntimeError, match="starts only one process"):
        recipe(name, monkeypatch, *TINY.split(), "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_is_another_run(name, monkeypatch, tmp_path):
    logs = []
    for seed in (0, 1):
        flags = [*TINY.split(), *SMALL.get(name, "").split(), "--seed", seed, "--output_dir", tmp_path / str(seed)]
        recipe(name, monkeypatch, *flags)
        logs.append(read(tmp_path / str(seed)))
    assert logs[0] != logs[1]
