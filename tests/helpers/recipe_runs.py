"""Running the files of recipes/ as a user does."""

import importlib
import json
import os
import struct
import subprocess
import sys

import pytest
from paths import RECIPES
from ranks import PATIENCE

TINY = "--steps 6 --train_size 128 --hidden 16 --sketch_dim 4 --probe_size 110 --kernel_size 10 --cpu"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RECIPES / "configs/single.yaml")]
SPAWN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""An environment in which files and terminals are ASCII if nobody says otherwise."""
STUDIES = [path.stem for path in sorted(RECIPES.glob("studies/*.py")) if "study.main(" in path.read_text()]
KEYS = ["step"]
for _quantities in (("loss", "accuracy"), ("alignment", "alignment_std_error")):
    KEYS += [f"{part}/{key}" for part in ("train", "test") for key in _quantities]
KEYS += ["train/path_complexity", "train/effective_rank", "train/participation_ratio"]


def load(name):
    """A file of recipes/ as a module, for tests without ``recipes_in_this_process``."""
    sys.path.insert(0, str(RECIPES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(RECIPES))


def parse(arguments, **options):
    """The flags of train.py, read as from its command line, and the checkpoint."""
    return load("training.flags").parse(load("training.config").Config, None, arguments, **options)


def module(name):
    """A file of recipes/ by its own name, for tests with ``recipes_in_this_process``."""
    return importlib.import_module(name)


def forget():
    """Let the next run in this process be its first."""
    from accelerate.state import AcceleratorState, PartialState  # not where no recipe runs

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def recipe(name, monkeypatch, *flags):
    """Run a recipe in this process, as its command line would."""
    source = module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
    try:
        source.main()
    finally:
        forget()


def refused(*arguments, capsys=None):
    """What a recipe says when it ends, in one line."""
    with pytest.raises(SystemExit) as stop:
        recipe(*arguments)
    said = f"{capsys.readouterr().err if capsys else ''}{stop.value}"
    assert "\n" not in str(stop.value)
    return said


def plan(**values):
    """What a comparison is to run."""
    options = {
        "command": "",
        "tasks": ["noise40", "few100"],
        "networks": ["mlp", "cnn"],
        "methods": list(module("comparison.methods").METHODS),
        "further": [],
        "versions": {},
    }
    options = {**options, **values}
    grids = {name: list(module("comparison.methods").KNOWN[name].weights) for name in options["methods"]}
    return module("comparison.plan").Plan(**{"grids": grids, **options})


def row(method, on_top=False):
    """A method in it."""
    return module("comparison.plan").Row(method, on_top)


def start(*flags, launcher=LAUNCH, cwd=None, **environment):
    command = [*launcher, str(RECIPES / "train.py"), *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, cwd=cwd)


def finish(process):
    stdout, stderr = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run(*flags, **options):
    return finish(start(*TINY.split(), *flags, **options))


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_wandb(file):
    """What an offline run of wandb wrote: a log of LevelDB's format, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = file.read_bytes(), 7, []
    found = {"history": [], "summary": {}, "config": {}, "metrics": set(), "id": None}
    while position + 7 <= len(data):
        left = 2**15 - position % 2**15
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind not in (1, 4):  # the whole of a record, or its last part
            continue
        record = Record.FromString(b"".join(parts))
        parts = []
        which = record.WhichOneof("record_type")
        if which == "history":
            items = record.history.item
            found["history"].append({_key(item): json.loads(item.value_json) for item in items})
        elif which == "summary":
            found["summary"].update({_key(item): json.loads(item.value_json) for item in record.summary.update})
        elif which == "run":
            found["id"] = record.run.run_id
            found["config"].update({item.key: json.loads(item.value_json) for item in record.run.config.update})
        elif which == "config":
            found["config"].update({_key(item): json.loads(item.value_json) for item in record.config.update})
        elif which == "metric":
            found["metrics"].add(record.metric.name or record.metric.glob_name)
    return found


def _key(item):
    return item.key or "/".join(item.nested_key)
