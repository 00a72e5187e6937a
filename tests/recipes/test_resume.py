"""A run that was ended, by force or politely, goes on as if it had not been."""

import hashlib
import json
import shutil
import signal
import sys
import time

import psutil
import pytest
import torch
from recipe_runs import SPAWN, TINY, finish, parse, read, recipe, run, start

FLAGS = "--steps 60 --checkpointing_steps 7 --label_noise 0.3 --regularizer alignment --weight 0.1 --reg_every 2"
PLAIN = [sys.executable]  # the recipe itself, without a launcher between it and the signal
LAUNCHERS = {"one process": PLAIN, "two processes": SPAWN}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Logs of runs that nobody ended, by launcher."""
    logs = {}
    for name, launcher in LAUNCHERS.items():
        folder = tmp_path_factory.mktemp("whole") / "run"
        result = run(*FLAGS.split(), "--output_dir", folder, launcher=launcher)
        assert result.returncode == 0, result.stderr
        logs[name] = (folder / "metrics.jsonl").read_bytes()
    return logs


def wait_for(process, folder, step):
    while not (folder / "checkpoints" / f"step_{step}").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def interrupt(process, folder, how, step):
    """End the processes of a run once the checkpoint of ``step`` is there."""
    wait_for(process, folder, step)
    family = psutil.Process(process.pid)
    workers = family.children(recursive=True)
    for member in (family, *workers) if how == signal.SIGKILL else (workers or [family])[:1]:
        try:
            member.send_signal(how)
        except psutil.NoSuchProcess:
            assert member is not family
    return finish(process)


def kill_the_launcher_alone(process, folder, monkeypatch):
    """Its workers outlive it, and while they do nothing goes on with their run."""
    wait_for(process, folder, 7)
    family = psutil.Process(process.pid)
    workers = family.children(recursive=True) or [family]
    for worker in workers:
        worker.suspend()  # or they might be done before we are
    if family not in workers:
        process.kill()
    try:
        with pytest.raises(SystemExit) as stop:
            recipe("train", monkeypatch, "--resume_from_checkpoint", folder)
    finally:
        for worker in workers:
            worker.kill()
        finish(process)
    said = str(stop.value)
    assert "--resume_from_checkpoint: expected a folder that no other process writes to, but process" in said
    assert any(f"process {worker.pid} on" in said for worker in workers)


def begin(folder, launcher):
    return start(*TINY.split(), *FLAGS.split(), "--output_dir", folder, launcher=launcher)


def resume(folder, launcher):
    return start("--resume_from_checkpoint", folder, launcher=launcher)


@pytest.mark.usefixtures("recipes_in_this_process")
@pytest.mark.parametrize("processes", LAUNCHERS)
def test_killed_three_times_is_the_uninterrupted_run(uninterrupted, processes, tmp_path, monkeypatch):
    """Wherever in a step, a measurement or a checkpoint the kill comes."""
    folder, launcher = tmp_path / "run", LAUNCHERS[processes]
    kill_the_launcher_alone(begin(folder, launcher), folder, monkeypatch)
    for step in (28, 49):
        interrupt(resume(folder, launcher), folder, signal.SIGKILL, step)
    assert (folder / "metrics.jsonl").read_bytes() != uninterrupted[processes]
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 59, "tr')  # as a process leaves it that was killed while it wrote
    moved = folder.rename(tmp_path / "moved")
    # From an earlier checkpoint than the newest: what the log has beyond it is measured again.
    result = finish(resume(moved / "checkpoints" / "step_28", launcher))
    assert result.returncode == 0, result.stderr
    assert (moved / "metrics.jsonl").read_bytes() == uninterrupted[processes]
    assert (moved / "figure.png").exists()


@pytest.mark.parametrize("processes", LAUNCHERS)
def test_sigterm_stops_between_steps(uninterrupted, processes, tmp_path):
    """One process gets the signal, all stop after the same step, and none of the steps is lost or repeated."""
    folder, launcher = tmp_path / "run", LAUNCHERS[processes]
    result = interrupt(begin(folder, launcher), folder, signal.SIGTERM, 7)
    assert result.returncode != 0
    assert "stopped by SIGTERM after step" in result.stdout
    if processes == "one process":
        assert result.returncode == 143
    stopped = int(result.stdout.split("after step ")[1].split(";")[0])
    assert 7 <= stopped < 60
    assert (folder / "checkpoints" / f"step_{stopped}").is_dir()
    assert max(line["step"] for line in read(folder)) <= stopped
    result = finish(resume(folder / "checkpoints" / f"step_{stopped}", launcher))
    assert result.returncode == 0, result.stderr
    assert (folder / "metrics.jsonl").read_bytes() == uninterrupted[processes]


MODELS = {
    "mlp": "--model mlp",
    "cnn": "--model cnn --hidden 4 --augment",
    "vgg11": "--model vgg11 --hidden 2 --init kaiming",
    "resnet18": "--model resnet18 --hidden 2 --batch_norm",
    "transformer": "--model transformer --hidden 8",
}
SIGNALS = {"killed": signal.SIGKILL, "terminated": signal.SIGTERM}
# Each way of ending, each launcher; all of them: pytest -m thorough tests/recipes/test_resume.py
SOME = [
    ("cnn", "killed", "one process"),
    ("vgg11", "terminated", "two processes"),
    ("transformer", "terminated", "one process"),
]
ALL = [(model, how, processes) for model in MODELS for how in SIGNALS for processes in LAUNCHERS]


@pytest.mark.parametrize(
    ("model", "how", "processes"),
    [pytest.param(*case, marks=[] if case in SOME else pytest.mark.thorough) for case in ALL],
)
def test_every_network_goes_on(model, how, processes, tmp_path):
    launcher = LAUNCHERS[processes]
    flags = [
        *TINY.split(),
        *MODELS[model].split(),
        *["--steps", "20", "--checkpointing_steps", "6", "--batch_size", "16"],
    ]
    flags += ["--regularizer", "complexity", "--weight", "0.01"]
    logs = []
    for name in ("whole", how):
        folder = tmp_path / name
        process = start(*flags, "--output_dir", folder, launcher=launcher)
        if name == "whole":
            result = finish(process)
        else:
            interrupt(process, folder, SIGNALS[how], 6)
            result = finish(resume(folder, launcher))
        assert result.returncode == 0, result.stderr
        logs.append((folder / "metrics.jsonl").read_bytes())
    assert logs[0] == logs[1]


def test_max_steps_and_on(uninterrupted, tmp_path):
    """A trial is the beginning of the whole run."""
    folder = tmp_path / "run"
    result = finish(start(*TINY.split(), *FLAGS.split(), "--max_steps", 10, "--output_dir", folder, launcher=PLAIN))
    assert result.returncode == 0, result.stderr
    assert "stopped by --max_steps after step 10" in result.stdout
    assert (folder / "figure.png").exists()
    assert uninterrupted["one process"].startswith((folder / "metrics.jsonl").read_bytes())
    result = finish(resume(folder, PLAIN))
    assert result.returncode == 0, result.stderr
    assert (folder / "metrics.jsonl").read_bytes() == uninterrupted["one process"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    interrupt(begin(folder, PLAIN), folder, signal.SIGTERM, 7)
    return folder


def spoil_truncated(run, checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoil_changed(run, checkpoint):
    file = checkpoint / "process_0.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def spoil_missing(run, checkpoint):
    (checkpoint / "optimizer.bin").unlink()


def spoil_manifest(run, checkpoint):
    file = checkpoint / "manifest.json"
    file.write_text(file.read_text()[:-50])


def spoil_step(run, checkpoint):
    """Of the step, which nothing else in the file depends on, another digit."""
    file, step = checkpoint / "manifest.json", checkpoint.name[5:]
    file.write_text(file.read_text().replace(f'"step": {step}', f'"step": {int(step) ^ 1}'))


def written(checkpoint, change):
    """A manifest with its digest, of other content."""
    file = checkpoint / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["digest"]
    change(manifest)
    manifest["digest"] = hashlib.sha256((json.dumps(manifest, indent=1) + "\n").encode()).hexdigest()
    file.write_text(json.dumps(manifest, indent=1) + "\n")


def changed(**entries):
    return lambda run, checkpoint: written(checkpoint, lambda manifest: manifest.update(entries))


def spoil_foreign(run, checkpoint):
    written(checkpoint, lambda manifest: manifest["config"].update(lr=0.5))


def spoil_unlisted(run, checkpoint):
    (checkpoint / "optimizer.bin").write_bytes(b"damaged")
    written(checkpoint, lambda manifest: manifest["files"].pop("optimizer.bin"))


def spoil_added(run, checkpoint):
    (checkpoint / "scheduler.bin").write_bytes(b"what Accelerate would read")


def spoil_random_states(run, checkpoint):
    file = checkpoint / "random_states_0.pkl"
    file.write_bytes(b"no random states")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    written(checkpoint, lambda manifest: manifest["files"].update({file.name: digest}))


def spoil_name(run, checkpoint):
    checkpoint.rename(checkpoint.with_name("step_59"))


def spoil_log(run, checkpoint):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[1:]) + "\n")


def spoil_config(run, checkpoint):
    (run / "config.json").write_text("{}")


SPOILED = {
    "truncated": (spoil_truncated, "model.safetensors is truncated or was changed"),
    "one bit": (spoil_changed, "process_0.pt is truncated or was changed"),
    "missing": (spoil_missing, "optimizer.bin is missing"),
    "manifest": (spoil_manifest, "manifest.json is truncated, or not the manifest"),
    "foreign": (spoil_foreign, "it belongs to another run, which differs in lr"),
    "one digit": (spoil_step, "manifest.json was changed"),
    "step of another": (changed(step=5), "manifest.json is for step 5"),
    "step below": (changed(step=-5), "manifest.json is for step -5"),
    "step beyond": (changed(step=10**99), "manifest.json is for step a number of more than 50 digits"),
    "step true": (changed(step=True), "truncated, or not the manifest"),
    "no files": (
        changed(files={}),
        "manifest.json does not list model.safetensors, optimizer.bin, process_0.pt, random",
    ),
    "unlisted": (spoil_unlisted, "manifest.json does not list optimizer.bin"),
    "added": (spoil_added, "scheduler.bin does not belong to it"),
    "random states": (spoil_random_states, "random_states_0.pkl cannot be read"),
    "name": (spoil_name, "manifest.json is for step"),
    "processes": (changed(processes=2), "2 process(es) wrote it and 1 would read it"),
    "log": (spoil_log, "lacks [0]"),
    "config": (spoil_config, "config.json of an earlier run, got another kind of file"),
}


@pytest.mark.usefixtures("recipes_in_this_process")
@pytest.mark.parametrize("kind", SPOILED)
def test_what_is_not_whole_or_not_ours_is_refused(stopped, kind, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    checkpoint = max(folder.glob("checkpoints/step_*"), key=lambda p: int(p.name[5:]))
    spoil, message = SPOILED[kind]
    spoil(folder, checkpoint)
    (checkpoint,) = [checkpoint] if checkpoint.exists() else folder.glob("checkpoints/step_59")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        recipe("train", monkeypatch, "--resume_from_checkpoint", checkpoint)
    assert stop.value.code
    said = " ".join(f"{capsys.readouterr().err} {stop.value}".split())
    assert message in said
    assert str(checkpoint if kind not in ("log", "config") else folder) in said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("recipes_in_this_process")
def test_random_states_that_accelerate_leaves_out(stopped, tmp_path, monkeypatch):
    """It says nothing where they cannot be set, and goes on to another log."""
    shutil.copytree(stopped, tmp_path / "run")
    monkeypatch.setattr(torch, "set_rng_state", lambda _: (_ for _ in ()).throw(RuntimeError("of another version")))
    with pytest.raises(SystemExit, match=r"the random states of random_states_0\.pkl do not fit this machine"):
        recipe("train", monkeypatch, "--resume_from_checkpoint", tmp_path / "run")


def test_other_flags_are_refused(stopped, capsys):
    with pytest.raises(SystemExit):
        parse(["--resume_from_checkpoint", str(stopped), "--lr", "0.5"])
    assert "--lr: expected the value of the resumed run, 0.05, got 0.5" in capsys.readouterr().err
    config, checkpoint = parse(["--resume_from_checkpoint", str(stopped), "--lr", "0.05"])
    assert config.steps == 60
    assert checkpoint.parent.parent == stopped


def test_checkpoints_hold_no_code(stopped):
    """Every file of a checkpoint loads without unpickling code, and random states come back."""
    from accelerate.utils import load as accelerate_load

    checkpoint = max(stopped.glob("checkpoints/step_*"), key=lambda p: int(p.name[5:]))
    names = {file.name for file in checkpoint.iterdir()}
    assert names == {
        "manifest.json",
        "model.safetensors",
        "optimizer.bin",
        "process_0.pt",
        "random_states_0.pkl",
    } | {name for name in names if name.startswith("sampler")}
    own = torch.load(checkpoint / "process_0.pt", weights_only=True)
    assert set(own) == {"path", "regularizer"}
    assert int(own["regularizer"]["step"]) == int(checkpoint.name[5:])
    torch.load(checkpoint / "optimizer.bin", weights_only=True)
    assert "torch_manual_seed" in accelerate_load(checkpoint / "random_states_0.pkl")
