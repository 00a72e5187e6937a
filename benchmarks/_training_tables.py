"""Tables of benchmarks/training.json, for texts with marks."""

import re
import statistics

LABELS = {0: "clean", 0.4: "40 % redrawn"}
BELOW = 0.02
DEFAULTS = {"complexity penalty": 0.01, "alignment": 0.1, "participation ratio": 0.01, "KARE": 1}


def mean(value, decimals=3):
    return f"{statistics.mean(value):.{decimals}f}" if isinstance(value, list) else str(value)


def penalty_table(rows):
    """Return accuracies by the normalization of the penalty, with one column per weight."""
    weights = sorted({row["weight"] for row in rows})
    lines = []
    for labels, title in LABELS.items():
        of_labels = [row for row in rows if row["labels"] == labels]
        for how in dict.fromkeys(row["normalized_by"] for row in of_labels if row["weight"]):
            by_weight = {row["weight"]: row for row in of_labels if row.get("normalized_by", how) == how}
            lines.append([title, how, *(_both(by_weight.get(weight)) for weight in weights)])
    return _table(["labels", "normalized by", "none", *(f"{weight:g}" for weight in weights[1:])], lines)


def examples_table(rows):
    """Return the effect of using few examples, with and without batch statistics."""
    decimals = {"value_bias": 2, "value_spread": 2, "gradient_bias": 2, "gradient_spread": 2}
    decimals |= {"accuracy_clean": 3, "accuracy_noisy": 3}
    lines = []
    for row in sorted(rows, key=lambda row: (row["normalization"], row["network"])):
        cells = [mean(row[key], count).removeprefix("0") for key, count in decimals.items()]
        lines.append([f"{row['network']}, {row['normalization']}", str(row["examples"]), *cells])
    return _table(["", "examples", *(key.replace("_", ": ") for key in decimals)], lines)


def cost_table(rows):
    """Return the cost of evaluations in plain steps, with batch statistics and with running statistics."""
    networks = dict.fromkeys(f"{row['network']}, {row['normalization']}" for row in rows)
    lines = []
    for loss in DEFAULTS:
        of_loss = [row for row in rows if row["loss"] == loss]
        lines.append([loss, *(f"{mean(row['training'], 0)}x / {mean(row['running'], 0)}x" for row in of_loss)])
    return _table(["", *networks], lines)


def networks_table(rows):
    """Return accuracies at 0.1, 1 and 3 times the default weight, in bold if far below those without a loss."""

    def of(row):
        return row["network"], row["normalization"], row["labels"]

    lines = []
    for network in sorted(dict.fromkeys(map(of, rows)), key=lambda key: key[2]):
        by_loss = {loss: [] for loss in ("none", *DEFAULTS)}
        for row in rows:
            if of(row) == network:
                by_loss[row["loss"]].append(row)
        (none,) = by_loss.pop("none")
        least = statistics.mean(none["accuracy"]) - BELOW
        cells = [_by_weight(of_loss, DEFAULTS[loss], least) for loss, of_loss in by_loss.items()]
        title = ", ".join(network[:2]) + (f"; {LABELS[network[2]]}" if network[2] else "")
        lines.append([title, _accuracy(none), *cells])
    return _table(["", "none", *DEFAULTS], lines)


TABLES = {"penalty": penalty_table, "examples": examples_table, "cost": cost_table, "networks": networks_table}


def filled(text, found):
    """Return a text with its tables between ``<!-- training: PART -->`` and ``<!-- end -->`` regenerated."""

    def table(match):
        return f"{match['mark']}\n{TABLES[match['part']](found[match['part']])}{match['end']}"

    return re.sub(r"(?P<mark><!-- training: (?P<part>\w+) -->)\n.*?(?P<end><!-- end -->)", table, text, flags=re.DOTALL)


def _by_weight(rows, default, least):
    """Return all three accuracies, or only that at the default weight if the others were not run."""
    found = {row["weight"]: _accuracy(row, least) for row in rows}
    return " / ".join(found[weight] for weight in sorted(found)) if len(found) == 3 else found.get(default, "–")


def _accuracy(row, least=0.0):
    shown = mean(row["accuracy"]).removeprefix("0") + ("†" if row["diverged"] else "")
    return f"**{shown}**" if statistics.mean(row["accuracy"]) < least else shown


def _both(row):
    return "" if row is None else f"{_accuracy(row)} ({mean(row['by_batch']).removeprefix('0')})"


def _table(titles, lines):
    rows = [titles, ["---"] * len(titles), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
