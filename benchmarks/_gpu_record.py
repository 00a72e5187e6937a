"""The record and the time budget of a run on a GPU; standard library alone, because it must not fail."""

import json
import math
import os
import signal
import subprocess
import time

LINES = 60
"""The largest number of lines of the summary."""


class Budget:
    """The time left until a deadline of the wall clock, which other processes share."""

    def __init__(self, deadline):
        self.deadline = deadline

    @property
    def left(self):
        return max(0.0, self.deadline - time.time())

    def allows(self, seconds):
        """Return whether something of this duration would finish in time."""
        return self.left > seconds


def shares(weights, seconds):
    """Return the seconds of each part, in proportion to the weights."""
    return {part: seconds * weight / sum(weights.values()) for part, weight in weights.items()}


def read(path):
    return json.loads(path.read_text()) if path.exists() else {}


def write(path, found):
    """Write atomically, so that a process killed here leaves the json unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(found, indent=1) + "\n")
    new.replace(path)


class Record:
    """One part of the json, which is rewritten with every row."""

    def __init__(self, path, part):
        self.path, self.part = path, part

    def update(self, **values):
        found = read(self.path)
        found[self.part] = {**found.get(self.part, {}), **values}
        write(self.path, found)

    def start(self, **header):
        found = read(self.path)
        found[self.part] = {**header, "status": "begun", "checks": [], "rows": []}
        write(self.path, found)

    def _append(self, key, row):
        found = read(self.path)
        found[self.part][key].append(row)
        write(self.path, found)
        print(f"  {line(row)}", flush=True)

    def row(self, **values):
        self._append("rows", values)

    def check(self, name, error, tolerance, note=""):
        """Record the result of a check; NaN fails."""
        ok = bool(error <= tolerance)
        shown = error if math.isfinite(error) else None
        note = note if math.isfinite(error) else f"{note} (error is {error})".strip()
        row = {"name": name, "error": shown, "tolerance": tolerance, "ok": ok}
        self._append("checks", row | ({"note": note} if note else {}))
        return ok

    def failed(self, name, error):
        """Record a check that raised."""
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self._append("checks", {"name": name, "error": None, "tolerance": 0.0, "ok": False, "note": said})

    def skipped(self, name, why):
        """Record something that was not run."""
        self._append("rows", {"name": name, "not_run": why})


def in_process(command, seconds, errors, *, cwd, env):
    """Run a command and its children for at most ``seconds``; return how it ended."""
    with errors.open("w") as file:
        process = subprocess.Popen(command, stderr=file, cwd=cwd, env=env, start_new_session=True)  # noqa: S603
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code == 0:
        return "done"
    said = [text for text in errors.read_text(errors="replace").splitlines() if text.strip()]
    return f"crashed ({code}): {(said or ['no output'])[-1][:300]}"


def is_failed(part):
    """Return whether a part of the json has a failed check or did not finish."""
    return not part.get("status", "").startswith("done") or not all(check["ok"] for check in part["checks"])


def line(row):
    """Return a row as text."""
    return "  ".join(f"{key.replace('_', ' ')} {cell(value)}" for key, value in row.items() if value is not None)


def cell(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def summary(found, parts):
    """Return the lines of the summary: the faults of each part, and its last row of each kind."""
    first = next((found[part] for part in parts if part in found), {})
    lines = [line({key: value for key, value in first.items() if isinstance(value, str) and key != "status"})[:200]]
    shown = {part: _shown(found[part]) if part in found else [] for part in parts}
    room, takes = LINES - len(lines) - 2 * len(parts), {}
    for left, part in enumerate(sorted(parts, key=lambda part: len(shown[part]))):
        takes[part] = min(len(shown[part]), room // (len(parts) - left))
        room -= takes[part]
    for part in parts:
        checks = found.get(part, {}).get("checks", [])
        right = f", {sum(check['ok'] for check in checks)} of {len(checks)} checks right" if checks else ""
        lines.append(f"{part}: {found[part]['status'] if part in found else 'not run'}{right}")
        lines += [text[:150] for text in shown[part][: takes[part]]]
        if len(shown[part]) > takes[part]:
            lines.append(f"  ... and {len(shown[part]) - takes[part]} more in the json")
    return lines


def _shown(part):
    rows = {}
    for row in part["rows"]:
        rows[tuple(value for value in row.values() if isinstance(value, str))] = row
    wrong = [f"  WRONG  {line(check)}" for check in part["checks"] if not check["ok"]]
    return wrong + [f"  {line(row)}" for row in sorted(rows.values(), key=lambda row: "not_run" in row)]
