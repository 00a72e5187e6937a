"""A run's folder: one writer, whole or as it was, and one line where something is in the way."""

import builtins
import errno
import importlib
import json
import multiprocessing
import os
import resource
import sys
import types

import pytest
from recipe_runs import TINY, module, parse, read, recipe, refused

pytestmark = pytest.mark.usefixtures("recipes_in_this_process")
PLAIN = [*TINY.split(), "--measure=", "--no-figure"]
STEPS = [*PLAIN, "--steps", "12", "--checkpointing_steps", "4"]


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A run with checkpoints of steps 4 and 5."""
    recipe("train", monkeypatch, *STEPS, "--max_steps", 5, "--output_dir", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """The log of the run that nobody ended."""
    recipe("train", monkeypatch, *STEPS, "--output_dir", tmp_path / "whole")
    return (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_one_writer(tmp_path):
    lock = module("training.lock")
    with lock.hold(tmp_path, "--flag"):
        with (
            pytest.raises(ValueError, match=rf"--flag: .*process {os.getpid()} on .*\.lock\. Wait"),
            lock.hold(tmp_path, "--flag"),
        ):
            pass
        assert (tmp_path / lock.NAME).exists()
    assert not list(tmp_path.iterdir())
    (tmp_path / lock.NAME).write_text("process 1 on a machine that was switched off")
    with lock.hold(tmp_path, "--flag"):
        assert f"process {os.getpid()}" in (tmp_path / lock.NAME).read_text()
    with (
        pytest.raises(ValueError, match="--flag: expected a writable folder"),
        lock.hold(tmp_path / "none", "--flag"),
    ):
        pass


def test_a_lock_is_not_that_of_a_file_that_is_gone(tmp_path, monkeypatch):
    """Its holder removes it between another's opening and locking."""
    lock, real, removed = module("training.lock"), module("training.lock")._lock, []

    def late(file):
        if not removed:
            removed.append((tmp_path / lock.NAME).unlink())
        real(file)

    monkeypatch.setattr(lock, "_lock", late)
    with lock.hold(tmp_path, "--flag"):
        assert (tmp_path / lock.NAME).exists()
        with pytest.raises(ValueError, match="--flag"), lock.hold(tmp_path, "--flag"):
            pass


def test_locks_elsewhere(tmp_path, monkeypatch, capsys):
    """Of Windows, and file systems without any."""
    lock, calls = module("training.lock"), []

    def locking(descriptor, mode, count):
        calls.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, count))
        if len(calls) > 1:
            raise PermissionError(errno.EACCES, "held")

    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    with monkeypatch.context() as patch:
        patch.setattr(lock, "fcntl", None)
        with lock.hold(tmp_path, "--flag"), pytest.raises(ValueError, match="--flag"), lock.hold(tmp_path, "--flag"):
            pass
    assert calls == [(lock.BEYOND, 2, 1)] * 2

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with lock.hold(tmp_path, "--flag"):
        assert "this file system has no locks (No locks available)" in capsys.readouterr().err


def test_a_run_that_is_written_to_is_not_gone_on_with(begun, monkeypatch):
    with module("training.lock").hold(begun, "--flag"):
        before = files(begun)
        said = refused("train", monkeypatch, "--resume_from_checkpoint", begun)
        assert (
            f"--resume_from_checkpoint: expected a folder that no other process writes to, but process {os.getpid()}"
            in said
        )
        assert str(begun / ".lock") in said
        assert files(begun) == before
    recipe("train", monkeypatch, "--resume_from_checkpoint", begun)
    assert [line["step"] for line in read(begun)] == [0, 5, 6, 8, 10, 12]
    assert not (begun / ".lock").exists()


def test_of_two_that_claim_a_folder_one_gets_it(tmp_path, monkeypatch):
    run = module("training.run_folder")
    run.claim(tmp_path, "")
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda _: iter(()))  # as it was for the other a moment ago
    with pytest.raises(ValueError, match="holds another run"):
        run.claim(tmp_path, "")


def test_studies_are_gone_on_with_once(tmp_path, begun):
    jobs, lock = module("studies.jobs"), module("training.lock")
    with (
        jobs.opened(None, tmp_path / "study", "name") as folder,
        pytest.raises(ValueError, match="--resume: expected a folder that no other process writes to"),
        jobs.opened(folder, None, "name"),
    ):
        pass
    (begun / "checkpoints").rename(tmp_path / "elsewhere")
    with lock.hold(begun, "--flag"):  # by a process that outlived its study
        before = files(begun)
        assert "that no other process writes to" in jobs._train(begun, parse(["--cpu"])[0])
        assert files(begun) == before


def test_latest_begins_and_goes_on(tmp_path, whole, monkeypatch):
    """The same command each time, as launchers start it again."""
    folder = tmp_path / "run"
    loop = module("training.loop")
    advance = loop.advance

    def crash_at(last):
        def crashing(run, step, x, y):
            if step > last:
                raise RuntimeError("a cosmic ray")
            advance(run, step, x, y)

        monkeypatch.setattr(loop, "advance", crashing)

    command = [*STEPS, "--output_dir", folder, "--resume_from_checkpoint", "latest"]
    steps = []
    for last in (2, 6, 9, 12):  # without a checkpoint, and after the first and second
        crash_at(last)
        if last < 12:
            with pytest.raises(RuntimeError, match="cosmic"):
                recipe("train", monkeypatch, *command)
            steps.append(sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step_*")))
    assert steps == [[], [4], [4, 8]]
    recipe("train", monkeypatch, *command)
    assert (folder / "metrics.jsonl").read_bytes() == whole


def test_latest_is_of_this_run(tmp_path, begun, monkeypatch, capsys):
    before = files(begun)
    latest = ["--output_dir", begun, "--resume_from_checkpoint", "latest"]
    assert "--hidden: expected the value of the resumed run, 16, got 8" in refused(
        "train", monkeypatch, "--hidden", 8, *latest, capsys=capsys
    )
    config = tmp_path / "config.yaml"
    config.write_text("lr: 0.5\n")
    assert "--lr: expected the value of the resumed run, 0.05, got 0.5" in refused(
        "train", monkeypatch, "--config", config, *latest, capsys=capsys
    )
    assert "expected --output_dir with it" in refused(
        "train", monkeypatch, "--resume_from_checkpoint", "latest", capsys=capsys
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    said = refused("train", monkeypatch, *PLAIN, "--output_dir", tmp_path / "other", *latest[2:])
    assert "holds another run" in said
    assert files(begun) == before
    # One that is done, and has no checkpoint to go on from, is not begun again.
    done = tmp_path / "done"
    recipe("train", monkeypatch, *PLAIN, "--output_dir", done)
    before = files(done)
    said = refused("train", monkeypatch, *PLAIN, "--output_dir", done, *latest[2:])
    assert "expected an unfinished run" in said
    assert files(done) == before


def test_disk_full(begun, whole, monkeypatch):
    """What the system refuses while a checkpoint is written: older ones are left, and the run goes on from them."""
    checkpoint = module("training.checkpoint")
    save, (soft, hard) = checkpoint.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
        try:
            return save(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        said = refused("train", patch, "--resume_from_checkpoint", begun)
    assert "--output_dir: expected a writable folder, but" in said
    assert (
        f"step_8.partial: File too large. Free space there, and continue with --resume_from_checkpoint {begun}" in said
    )
    assert {path.name for path in (begun / "checkpoints").iterdir()} == {"step_4", "step_5"}
    recipe("train", monkeypatch, "--resume_from_checkpoint", begun)
    assert (begun / "metrics.jsonl").read_bytes() == whole


@pytest.mark.parametrize("place", ["safetensors", "torch"])
def test_no_room_for_a_checkpoint_is_said_by_torch_and_safetensors(place, tmp_path, monkeypatch):
    """Neither raises an OSError; which one writes first depends on the sizes."""
    from safetensors import SafetensorError

    checkpoint = module("training.checkpoint")
    error = {"safetensors": SafetensorError("I/O error"), "torch": RuntimeError("unexpected pos 1792 vs 1688\nat")}[
        place
    ]
    (tmp_path / "run").mkdir()
    partial = tmp_path / "run" / "checkpoints" / ".step_6.partial"
    assert "No such file or directory. Free space there, and start again." in str(checkpoint._unwritten(partial, error))
    partial.mkdir(parents=True)
    assert f"{str(error).splitlines()[0]}. Free space" in str(checkpoint._unwritten(partial, error))


def test_a_log_that_cannot_be_written(tmp_path, monkeypatch):
    run = module("training.run_folder")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(builtins, "open", full)
    monkeypatch.setattr(type(tmp_path), "open", full)
    with pytest.raises(ValueError, match=r"--output_dir: .*metrics\.jsonl: No space left on device\."):
        run.append(tmp_path, {"step": 0})


def test_files_are_whole_or_as_they_were(tmp_path, monkeypatch):
    write, path = module("training.storage").write, tmp_path / "file"
    write(path, "±")
    assert path.read_bytes() == "±".encode()
    monkeypatch.setattr(
        type(path), "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
    )
    with pytest.raises(ValueError, match="file: Input/output error"):
        write(path, "new")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == "±".encode()


def test_wandb_without_login(tmp_path, monkeypatch):
    """One line, and nothing is left that the same command would meet again."""
    for name, value in {"HOME": tmp_path / "home", "NETRC": tmp_path / "none", "WANDB_MODE": "online"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    flags = [*PLAIN, "--with_tracking", "--output_dir", tmp_path / "run"]
    said = refused("train", monkeypatch, *flags)
    assert "--with_tracking: expected wandb to open a run, but" in said
    assert "WANDB_MODE=offline" in said
    assert not (tmp_path / "run").exists()
    importlib.import_module("wandb").teardown()


def test_a_run_that_diverges(tmp_path, monkeypatch):
    said = refused("train", monkeypatch, *PLAIN, "--measure=ranks", "--lr", "1e30", "--output_dir", tmp_path / "run")
    assert "training ended at step 5: " in said
    assert "contain NaN" in said
    assert "lower --lr or --weight" in said
    assert str(tmp_path / "run" / "metrics.jsonl") in said
    assert [line["step"] for line in read(tmp_path / "run")] == [0]


def test_the_largest_seed(tmp_path, monkeypatch):
    """Whatever draws with it; below, augmentation draws as it always has."""
    flags = [*PLAIN, "--model", "cnn", "--augment", "--seed", 2**32 - 1]
    recipe("train", monkeypatch, *flags, "--output_dir", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["seed"] == 2**32 - 1


def test_nothing_is_left_running():
    assert not multiprocessing.active_children()
