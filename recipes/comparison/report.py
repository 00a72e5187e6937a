"""The tables and sentences that report a comparison, made from its json alone."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, final

from scipy.stats import t as student

from comparison import figures
from comparison.figures import ALIGNMENT, PATH, RANK, TEST
from comparison.methods import DECAY, NONE, SMOOTHING, base, words
from studies.jobs import broken_off
from training import run_folder, storage
from training.plots import Log

REACHED = {
    "test": TEST,
    "train": "train/accuracy",
    "alignment": ALIGNMENT,
    "effective_rank": RANK,
    "path_complexity": PATH,
}
"""The values to keep of the last line of a log, by name."""
ENOUGH = 8
"""The number of seeds from which results count as evidence."""
Values = list[float | None]
"""One value per seed; ``None`` if undefined."""


@final
class Estimate(NamedTuple):
    """A mean over seeds and its interval."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """The sign of the mean if the interval excludes zero, else 0."""
        return (self.low > 0) - (self.high < 0)

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]".replace("-", "−")


def interval(values: list[float], comparisons: int = 1) -> Estimate:
    """Return the mean and its 95 % interval (Student's t), simultaneous over ``comparisons`` (Bonferroni)."""
    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    half = float(student.ppf(1 - 0.025 / comparisons, len(values) - 1)) * error
    return Estimate(mean, mean - half, mean + half)


def log_of(run: Path) -> Log:
    """Return a run's log; that of a diverged run ends with accuracies of zero and everything else undefined."""
    log = run_folder.read(run)
    if broken_off(run):
        last = {key: 0.0 if key.endswith("/accuracy") else math.nan for key in log[-1]}
        log.append({**last, "step": log[-1]["step"] + 1})
    return log


def reached(logs: list[Log], without: list[Log]) -> dict[str, Values]:
    """Return the results of a method's runs, one value per seed.

    Besides values of the last line, these are the test accuracy at the best validation accuracy (``early_stopped``),
    and the effective rank and path complexity where held-out alignment first reaches the highest value of the run with
    the same seed and no regularizer (``rank_at_peak``, ``path_at_peak``; ``None`` if it never does).
    """
    values = {name: [log[-1][key] for log in logs] for name, key in REACHED.items()}
    best = [max(log, key=lambda line: line["val/accuracy"]) for log in logs]
    values["early_stopped"] = [line[TEST] for line in best]
    peaks = [max(filter(math.isfinite, (line[ALIGNMENT] for line in log)), default=math.inf) for log in without]
    crossed: dict[str, Values] = {
        name: [crossing(log, ALIGNMENT, peak, other) for log, peak in zip(logs, peaks, strict=True)]
        for name, other in {"rank_at_peak": RANK, "path_at_peak": PATH}.items()
    }
    return {name: [_short(value) for value in of_seeds] for name, of_seeds in {**values, **crossed}.items()}


def crossing(log: Log, key: str, level: float, other: str) -> float | None:
    """Return the value of ``other`` where ``key`` first reaches a level, interpolated between the lines of a log."""
    for before, line in zip([None, *log], log, strict=False):
        if line[key] >= level:
            share = 1.0 if before is None else (level - before[key]) / (line[key] - before[key])
            return line[other] if before is None else before[other] + share * (line[other] - before[other])
    return None


def _short(value: float | None) -> float | None:
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None


def report(place: Path, files: list[Path]) -> None:
    """Print the report of a comparison and put it into files; given its folder, also draw the figures.

    Args:
        place: the comparison's folder, or its json alone.
        files: texts with the marks ``<!-- comparison: BLOCK -->`` and ``<!-- end -->``, to put a block between.

    Raises:
        ValueError: if there is no comparison, or a mark names no block.
    """
    source = place / "comparison.json" if place.is_dir() else place
    try:
        found = json.loads(storage.read(source))
        settings = found["settings"]
    except (OSError, ValueError, KeyError):
        hint = f"; continue with --resume {place}" if (place / "plan.json").exists() else ""
        expected = "--report: expected the folder of a finished comparison, or its json"
        raise ValueError(f"{expected}, got {place}{hint}.") from None
    texts = {file: filled(storage.read(file), found) for file in files}
    for file, text in texts.items():
        with storage.writing(file, "--into"):
            file.write_text(text, encoding="utf-8")
    shown = {"table": full_table(found), "findings": findings(found)}
    print("\n".join(shown.values()))
    if place.is_dir():
        for name, text in shown.items():
            storage.write(place / f"{name}.md", text)
        for figure in figures.draw(place, settings, found["seeds"]):
            print(f"figure: {figure}")
    print(f"{found['runs']} runs, {found['minutes']:.0f} min: {source}")


def filled(text: str, found: dict[str, Any]) -> str:
    """Return a text with its blocks regenerated."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"--into: expected a mark for one of {', '.join(BLOCKS)}, got {name}.")
        return f"{match['mark']}\n{BLOCKS[name](found)}{match['end']}"

    return re.sub(
        r"(?P<mark><!-- comparison: (?P<name>[\w ]+) -->)\n.*?(?P<end><!-- end -->)", block, text, flags=re.DOTALL
    )


def against(setting: dict[str, Any], row: dict[str, Any], baseline: str | None, key: str = "test") -> Estimate | None:
    """Return a row's paired difference to a baseline method of its setting; ``None`` for the baseline itself.

    The intervals of all rows of a setting hold simultaneously with 95 %.
    """
    rows = setting["rows"]
    other = next((r for r in rows if r["method"] == baseline and not r["on_top"]), row)
    if row is other:
        return None
    pairs = zip(row["values"][key], other["values"][key], strict=True)
    return interval([a - b for a, b in pairs], comparisons=len(rows) - 1)


def full_table(found: dict[str, Any]) -> str:
    """Return all results, in a table for each setting."""
    methods = [row["method"] for row in found["settings"][0]["rows"]]
    baselines: dict[str, Callable[[str], str | None]] = {"− none": lambda _: NONE, "− weight decay": lambda _: DECAY}
    if SMOOTHING in methods:
        baselines["− label smoothing"] = lambda _: SMOOTHING
    if any(map(base, methods)):
        baselines["− its default"] = base
    titles = ["", "weight", "test accuracy ± half its 95 % interval", *baselines, "early stopped", "on training set"]
    titles += ["step", "alignment", "effective rank", "path complexity"]
    parts = []
    for setting in found["settings"]:
        lines = []
        for row in setting["rows"]:
            values = row["values"]
            own = interval(values["test"])
            cells = [_name(row), _weight(row), f"{own.mean:.3f} ± {own.high - own.mean:.3f}"]
            for of in baselines.values():
                difference = against(setting, row, of(row["method"]))
                text = str(difference or "")
                cells.append(f"**{text}**" if difference and difference.sign > 0 else text)
            cells += [_mean(values["early_stopped"], 3), _mean(values["train"], 3), f"{row['cost']:.1f}x"]
            digits = {"alignment": 3, "effective_rank": 0, "path_complexity": 0}
            lines.append(cells + [_mean(values[key], count) for key, count in digits.items()])
        parts.append(f"**{setting['setting']}** (`{setting['flags']}`)\n\n{_table(titles, lines)}")
    return "\n".join(parts)


def short_table(found: dict[str, Any], key: str = "test") -> str:
    """Return the mean test accuracies, with marks.

    Bold means significantly above tuned weight decay; * and † mean significantly above and below no regularizer; ‡
    marks methods with runs that collapsed to less than half the mean without a regularizer.
    """
    lines = []
    for rows in _across(found):
        cells = []
        for setting, row in zip(found["settings"], rows, strict=True):
            decay, none = (against(setting, row, baseline, key) for baseline in (DECAY, NONE))
            text = f"{statistics.mean(row['values'][key]):.3f}".removeprefix("0")
            text = f"**{text}**" if decay and decay.sign > 0 else text
            text += {1: r"\*", -1: "†"}.get(none.sign, "") if none else ""
            cells.append(text + ("‡" if _collapsed(setting, row, key) else ""))
        cost = statistics.mean(row["cost"] for row in rows)
        lines.append([_name(rows[0]), *cells, f"{cost:.1f}x"])
    return _table(["", *_labels(found), "step"], lines)


def early_table(found: dict[str, Any]) -> str:
    """Return the same table at the best validation accuracy, for all methods alike."""
    return short_table(found, "early_stopped")


def weights(found: dict[str, Any]) -> str:
    """Return the grid of weights of each method, and the weights that were chosen in each setting."""
    lines = [
        [_name(rows[0]), ", ".join(rows[0]["validation"]), *map(_weight, rows)]
        for rows in _across(found)
        if rows[0]["validation"]
    ]
    return _table(["", "weights", *_labels(found)], lines)


def findings(found: dict[str, Any]) -> str:
    """Return the findings: by method, then highest means, weights at the ends of grids, and failed runs."""
    settings = found["settings"]
    said = [] if found["seeds"] >= ENOUGH else [f"With {found['seeds']} seeds this is a quick look, not evidence."]
    for rows in _across(found):
        row = rows[0]
        baselines = {NONE: "none", DECAY: "tuned weight decay", base(row["method"]): "its default"}
        baselines[SMOOTHING] = "label smoothing"
        parts = [
            _counted({s["setting"]: against(s, r, baseline) for s, r in zip(settings, rows, strict=True)}, name)
            for baseline, name in baselines.items()
            if baseline is not None and row["method"] != NONE and not (row["on_top"] and baseline in (NONE, SMOOTHING))
        ]
        parts = [part for part in parts if part]
        if parts:
            said.append(f"**{_name(row)}**: {'; '.join(parts)}.")
    best = [(s["setting"], max(s["rows"], key=lambda row: statistics.mean(row["values"]["test"]))) for s in settings]
    means = [f"{label} {_name(row)} {statistics.mean(row['values']['test']):.3f}" for label, row in best]
    said.append(f"The highest means are: {', '.join(means)}.")
    tuned = [(setting["setting"], row) for setting in settings for row in setting["rows"] if row["validation"]]
    largest = [
        f"{label} {_name(row)} {_weight(row)}" for label, row in tuned if _weight(row) == [*row["validation"]][-1]
    ]
    smallest = sum(_weight(row) == next(iter(row["validation"])) for _, row in tuned)
    if largest:
        said.append(f"At the largest weight of their grids, so that a larger one may be better: {', '.join(largest)}.")
    said.append(f"At the smallest weight of their grids: {smallest} of {len(tuned)} choices.")
    for what, count in (
        ("ended below half the mean accuracy without a regularizer", _collapsed),
        ("diverged and count with an accuracy of zero", lambda _, row: row["broken_off"]),
    ):
        counts = [(f"{s['setting']} {_name(r)}", count(s, r)) for s in settings for r in s["rows"]]
        if any(number for _, number in counts):
            numbers = ", ".join(f"{label} {number}" for label, number in counts if number)
            said.append(f"Of {found['seeds']} runs each, some {what}: {numbers}.")
    return "".join(f"- {sentence}\n" for sentence in said)


def alike(found: dict[str, Any]) -> str:
    """Return ratios of the alignment loss to no regularizer, for effects that explicit and implicit alignment share."""
    titles = ["alignment loss / none", "held-out alignment", "effective rank", "path complexity"]
    titles += ["seeds that reach none's highest alignment", "effective rank there", "path complexity there"]
    lines = []
    for setting in found["settings"]:
        rows = {row["method"]: row["values"] for row in setting["rows"] if not row["on_top"]}
        if "alignment" in rows:
            own, none = rows["alignment"], rows[NONE]
            there = sum(value is not None for value in own["rank_at_peak"])
            cells = [ratio(own[key], none[key]) for key in ("alignment", "effective_rank", "path_complexity")]
            cells += [f"{there} of {found['seeds']}"]
            cells += [ratio(own[key], none[key]) for key in ("rank_at_peak", "path_at_peak")]
            lines.append([setting["setting"], *cells])
    return _table(titles, lines)


def ratio(values: Values, others: Values) -> str:
    """Return the geometric mean of paired ratios with its 95 % interval, over the seeds for which both are defined."""
    logs = [math.log(a / b) for a, b in zip(values, others, strict=True) if a and b]
    if len(logs) < 2:
        return "undefined"
    mean, low, high = (math.exp(value) for value in interval(logs))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def run(found: dict[str, Any]) -> str:
    """Return a sentence on how the numbers were produced."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"`{found['command']}`: {found['runs']} runs, {found['seeds']} final seeds, {found['minutes'] / 60:.1f} "
        f"hours on {found['machine']}; {versions}.\n"
    )


BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "short table": short_table,
    "early table": early_table,
    "weights": weights,
    "full table": full_table,
    "findings": findings,
    "alike": alike,
    "run": run,
}


def _counted(differences: dict[str, Estimate | None], name: str) -> str:
    known = {label: difference for label, difference in differences.items() if difference is not None}
    if not known:
        return ""
    parts = []
    for sign, side in ((1, "above"), (-1, "below")):
        labels = [f"{label} {difference}" for label, difference in known.items() if difference.sign == sign]
        if labels:
            parts.append(f"{side} {name} in {len(labels)} of {len(known)} ({'; '.join(labels)})")
    left = sum(difference.sign == 0 for difference in known.values())
    if left:
        parts.append(f"no significant difference from {name} in {left} of {len(known)}")
    return ", ".join(parts)


def _collapsed(setting: dict[str, Any], row: dict[str, Any], key: str = "test") -> int:
    none = next(other for other in setting["rows"] if other["method"] == NONE)
    least = statistics.mean(none["values"][key]) / 2
    return sum(value < least for value in row["values"][key])


def _name(row: dict[str, Any]) -> str:
    return words(row["method"], on_top=row["on_top"])


def _weight(row: dict[str, Any]) -> str:
    return "" if row["weight"] is None else f"{row['weight']:g}"


def _mean(values: Values, digits: int) -> str:
    defined = [value for value in values if value is not None]
    if not defined:
        return "undefined"
    mean = statistics.mean(defined)
    return f"{mean:.{digits}f}" if mean < 1e6 else f"{mean:.1e}"


def _across(found: dict[str, Any]) -> list[tuple[dict[str, Any], ...]]:
    """Return, for each method, its rows in all settings."""
    return list(zip(*(setting["rows"] for setting in found["settings"]), strict=True))


def _labels(found: dict[str, Any]) -> list[str]:
    return [setting["setting"].replace("-", " ") for setting in found["settings"]]


def _table(titles: list[str], lines: list[list[str]]) -> str:
    rows = [f"| {' | '.join(cells)} |" for cells in (titles, *lines)]
    return "\n".join([rows[0], "|---" * len(titles) + "|", *rows[1:]]) + "\n"
