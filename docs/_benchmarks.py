"""Writes the page of benchmarks from their json: one section per benchmark, one table per part."""

import ast
import json
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

HEAD = """\
# Benchmarks

This page shows the complete json that each benchmark last wrote; the other pages quote from it. Cells that combine
several runs give the mean ± its standard error. Times and memory depend on the machine; ratios carry over better.
[On a GPU](gpu.md) is a separate page.
"""


def write(folder: Path, page: Path) -> None:
    """Write the page of all benchmarks in a folder that have a json, except the one on a GPU (its own page)."""
    found = sorted(path for path in folder.glob("*.json") if path.stem != "gpu")
    put(page, "\n".join([HEAD, *map(_section, found)]))


def put(page: Path, text: str) -> None:
    """Write a page, unless it exists with this text."""
    if not page.exists() or page.read_text() != text:
        page.write_text(text)


def tables(found: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield for each table its path in the json, a line with the values that all its rows share, and the table.

    Args:
        found: The content of the json: a list of rows; a list of runs, which are lists of equally many rows and are
            merged; or a dict of these and of single values, which apply to all rows.
        path: The keys that lead to ``found``.

    Raises:
        TypeError: If ``found`` is none of these.
    """
    if isinstance(found, dict):
        single = {key: value for key, value in found.items() if not isinstance(value, (dict, list))}
        parts = {key: value for key, value in found.items() if key not in single}
        held = [f"{_words(key)} {_cell(value)}" for key, value in single.items()]
        if not parts:
            yield path, "", _table([found])
        for key, value in parts.items():
            for where, note, table in tables(value, path if key == "rows" else (*path, key)):
                yield where, ", ".join([*held, *([note] if note else [])]), table
    elif isinstance(found, list) and all(isinstance(row, dict) for row in found):
        yield path, "", _table(found)
    elif isinstance(found, list) and all(isinstance(run, list) for run in found):
        yield path, f"{len(found)} runs", _table([_merged(rows) for rows in zip(*found, strict=True)])
    else:
        raise TypeError(f"{path}: expected rows, runs of rows, or a dict of them, got {type(found).__name__}.")


def _section(path: Path) -> str:
    title, _, text = ast.get_docstring(ast.parse(path.with_suffix(".py").read_text())).partition("\n\n")
    lines = [f"## {title.rstrip('.')}\n"]
    for paragraph in text.split("\n\n"):
        if re.search(r"^ *(python|pip) ", paragraph):
            lines.append(f"```console\n{re.sub('^ +', '', paragraph, flags=re.MULTILINE)}\n```\n")
        elif re.search(r"\S  +\S|^  ", paragraph):  # columns
            lines.append(f"```text\n{paragraph}\n```\n")
        else:
            lines.append(paragraph + "\n")
    for where, note, table in tables(json.loads(path.read_text())):
        caption = ": ".join(filter(None, [f"**{_words(' '.join(where))}**" if where else "", note]))
        lines += [f"{caption}\n"] if caption else []
        lines.append(table + "\n")
    return "\n".join(lines)


def _merged(rows: tuple[dict, ...]) -> dict:
    """Merge the rows of several runs: values that differ become means ± standard errors."""
    merged = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        merged[key] = values[0] if len(set(values)) == 1 else _spread(values)
    return merged


def _table(rows: list[dict]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [map(_words, keys), ["---"] * len(keys), *([_cell(row.get(key)) for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(values: list[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    decimals = max(0, 1 - math.floor(math.log10(error))) if error else 3  # two digits of the error
    return f"{statistics.mean(values):,.{decimals}f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{error:,.{decimals}f}"


def _words(key: str) -> str:
    return key.replace("_mib", " (MiB)").replace("_", " ")


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return f"{_spread(value)} (of {len(value)})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    return str(value).replace("|", "\\|").replace("\n", " ")
