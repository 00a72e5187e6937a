"""What a comparison found, in tables, sentences and figures, from its json and logs alone."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple, final

from _figure import Log
from scipy.stats import t as student

REACHED = {
    "test": "test/accuracy",
    "train": "train/accuracy",
    "alignment": "test/kernel_alignment",
    "effective_rank": "train/effective_rank",
    "path_complexity": "train/path_complexity",
}
COLUMNS = (
    "weight",
    "test accuracy, 95 %",
    "− none",
    "− weight decay",
    "early stopped",
    "training accuracy",
    "cost of a step",
    "held-out alignment",
    "effective rank",
    "path complexity",
)
NONE, DECAY = "none", "weight_decay"


@final
class Difference(NamedTuple):
    """A mean over seeds and its interval."""

    mean: float
    low: float
    high: float

    @property
    def settled(self) -> int:
        """The sign, if the interval excludes zero; else 0."""
        return (self.low > 0) - (self.high < 0)

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def interval(values: list[float], comparisons: int = 1) -> Difference:
    """Return the mean and its 95 % interval (Student's t), for all of several comparisons together (Bonferroni)."""
    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    half = float(student.ppf(1 - 0.025 / comparisons, len(values) - 1)) * error
    return Difference(mean, mean - half, mean + half)


def reached(logs: list[Log], without: list[Log]) -> dict[str, list[float | None]]:
    """Return what runs came to, one a seed.

    Beside what is measured at the end: the test accuracy where validation accuracy was best (``early_stopped``), and
    effective rank and path complexity where held-out alignment first came up to the highest that the run of the same
    seed without a regularizer had (``rank_at_peak``, ``path_at_peak``; ``None`` if it never did).
    """
    values: dict[str, list[float | None]] = {
        name: [_finite(log[-1][key]) for log in logs] for name, key in REACHED.items()
    }
    best = [max(log, key=lambda line: line["val/accuracy"]) for log in logs]
    values["early_stopped"] = [line["test/accuracy"] for line in best]
    key = REACHED["alignment"]
    peaks = [max(line[key] for line in log) for log in without]
    for name, other in (("rank_at_peak", "effective_rank"), ("path_at_peak", "path_complexity")):
        values[name] = [crossing(log, key, peak, REACHED[other]) for log, peak in zip(logs, peaks, strict=True)]
    return values


def crossing(log: Log, key: str, level: float, other: str) -> float | None:
    """Return one value where another first comes up to a level, linearly between the lines of a log."""
    before: dict[str, float] | None = None
    for line in log:
        if line[key] >= level:
            if before is None:
                return line[other]
            share = (level - before[key]) / (line[key] - before[key])
            return before[other] + share * (line[other] - before[other])
        before = line
    return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def report(folder: Path) -> None:
    """Write table, findings and figures of a comparison, and print the first two."""
    import _comparison_figures  # matplotlib only where it draws

    found = json.loads((folder / "comparison.json").read_text())
    table, findings = full_table(found), "\n".join(f"- {sentence}" for sentence in sentences(found)) + "\n"
    (folder / "table.md").write_text(table)
    (folder / "findings.md").write_text(findings)
    figures = _comparison_figures.draw(folder, found)
    print(f"{table}\n{findings}")
    print("\n".join(f"figure: {figure}" for figure in figures))
    print(f"{found['runs']} runs, {found['minutes']:.0f} minutes; {folder / 'comparison.json'}")


def name_of(row: dict[str, Any]) -> str:
    """Name a row in words."""
    words = str(row["method"]).replace("_", " ").replace(":", ": ")
    words = {"kare": "KARE", "fisher": "Fisher trace"}.get(words, words)
    return f"{words} + weight decay" if row["on_top"] else words


def against(setting: dict[str, Any], row: dict[str, Any], baseline: str, key: str = "test") -> Difference | None:
    """Return a row's paired difference to a baseline of its setting; all such differences of a setting hold at once."""
    rows = setting["rows"]
    other = next(r for r in rows if r["method"] == baseline and not r["on_top"])
    if row is other:
        return None
    pairs = zip(row["values"][key], other["values"][key], strict=True)
    return interval([a - b for a, b in pairs], comparisons=len(rows) - 1)


def full_table(found: dict[str, Any]) -> str:
    """Return everything, a table for each setting."""
    parts = []
    for setting in found["settings"]:
        lines = [
            f"### {setting['setting']}\n",
            f"| | {' | '.join(COLUMNS)} |",
            "|---" * (len(COLUMNS) + 1) + "|",
        ]
        for row in setting["rows"]:
            values = row["values"]
            cells = [name_of(row), _weight(row), _accuracy(values["test"])]
            for baseline in (NONE, DECAY):
                difference = against(setting, row, baseline)
                cells.append("" if difference is None else _bold(str(difference), difference.settled))
            cells += [f"{statistics.mean(values['early_stopped']):.3f}", f"{statistics.mean(values['train']):.3f}"]
            cells += [f"{row['cost']:.1f}x"]
            cells += [
                _mean(values[key], digits)
                for key, digits in (("alignment", 3), ("effective_rank", 0), ("path_complexity", 0))
            ]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def short_table(found: dict[str, Any]) -> str:
    """Return the mean test accuracy of each method in each setting.

    Bold where the difference to tuned weight decay is settled to be positive, with a star where that to none is.
    """
    settings = found["settings"]
    head = [setting["setting"] for setting in settings]
    lines = [f"| | {' | '.join(head)} | step |", "|---|" + "---|" * (len(head) + 1)]
    for index, row in enumerate(settings[0]["rows"]):
        cells = []
        for setting in settings:
            own = setting["rows"][index]
            text = f"{statistics.mean(own['values']['test']):.3f}".removeprefix("0")
            decay, none = (against(setting, own, baseline) for baseline in (DECAY, NONE))
            text = _bold(text, decay.settled if decay else 0)
            mark = {1: "*", -1: "−"}.get(none.settled, "") if none else ""
            cells.append(text + mark.replace("*", r"\*"))
        costs = statistics.mean(setting["rows"][index]["cost"] for setting in settings)
        lines.append(f"| {name_of(row)} | {' | '.join(cells)} | {costs:.1f}x |")
    return "\n".join(lines) + "\n"


def sentences(found: dict[str, Any]) -> list[str]:
    """Return what the numbers say, a sentence each."""
    settings = found["settings"]
    said = []
    for index, row in enumerate(settings[0]["rows"]):
        parts = []
        for baseline in (NONE, DECAY):
            rows = [(setting["setting"], against(setting, setting["rows"][index], baseline)) for setting in settings]
            differences = {label: difference for label, difference in rows if difference is not None}
            if not differences:
                continue
            counts = []
            for sign, words in ((1, "above"), (-1, "below")):
                labels = [f"{label} {d}" for label, d in differences.items() if d.settled == sign]
                if labels:
                    counts.append(
                        f"{words} {baseline.replace('_', ' ')} in {len(labels)} of {len(differences)} settings: {'; '.join(labels)}"
                    )
            open_ = sum(d.settled == 0 for d in differences.values())
            if open_:
                counts.append(f"not settled against {baseline.replace('_', ' ')} in {open_} of {len(differences)}")
            parts += counts
        if parts:
            said.append(f"**{name_of(row)}**: {'; '.join(parts)}.")
    for setting in settings:
        edges = [
            f"{name_of(row)} {row['weight']:g}"
            for row in setting["rows"]
            if row["validation"] and f"{row['weight']:g}" in (list(row["validation"])[0], list(row["validation"])[-1])
        ]
        if edges:
            said.append(f"{setting['setting']}: chosen at the edge of their grids: {', '.join(edges)}.")
    return said + _alike(found)


def _alike(found: dict[str, Any]) -> list[str]:
    """Say whether explicit alignment comes with what implicit alignment comes with."""
    said = []
    for setting in found["settings"]:
        none = next(r for r in setting["rows"] if r["method"] == NONE)
        for row in setting["rows"]:
            if row["method"] != "alignment" or row["on_top"]:
                continue
            ratios = {
                key: ratio(row["values"][key], none["values"][key])
                for key in ("alignment", "effective_rank", "path_complexity", "rank_at_peak", "path_at_peak")
            }
            reach = sum(value is not None for value in row["values"]["rank_at_peak"])
            said.append(
                f"{setting['setting']}: at the end, alignment loss over none: held-out alignment {ratios['alignment']}, "
                f"effective rank {ratios['effective_rank']}, path complexity {ratios['path_complexity']}; where held-out "
                f"alignment comes up to the highest without a regularizer ({reach} of {len(none['values']['test'])} "
                f"seeds): effective rank {ratios['rank_at_peak']}, path complexity {ratios['path_at_peak']}."
            )
    return said


def ratio(values: list[float | None], others: list[float | None]) -> str:
    """Return the geometric mean of paired ratios with its 95 % interval, of those that are defined."""
    logs = [math.log(a / b) for a, b in zip(values, others, strict=True) if a and b]
    if len(logs) < 2:
        return "undefined"
    found = interval(logs)
    mean, low, high = (math.exp(value) for value in found)
    return f"x{mean:.2f} [{low:.2f}, {high:.2f}]"


def _weight(row: dict[str, Any]) -> str:
    return "" if row["weight"] is None else f"{row['weight']:g}"


def _accuracy(values: list[float]) -> str:
    found = interval(values)
    return f"{found.mean:.3f} ± {found.high - found.mean:.3f}"


def _mean(values: list[float | None], digits: int) -> str:
    defined = [value for value in values if value is not None]
    return f"{statistics.mean(defined):.{digits}f}" if defined else "undefined"


def _bold(text: str, sign: int) -> str:
    return f"**{text}**" if sign > 0 else text
