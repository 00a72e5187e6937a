"""Writes the page of the run on a GPU from the json of benchmarks/gpu.py, or says that there was no run."""

import json
from collections.abc import Iterator
from pathlib import Path

import _benchmarks

HEAD = """\
# On a GPU

```console
make gpu
python benchmarks/gpu.py --limit 8
```

One run takes several minutes. It checks that kernels, metrics and losses on the device equal those on the CPU in
float64, also under autocast, fused attention, `torch.compile`, CUDA graphs and NCCL, and measures their cost. `--help`
says what each part does. `python benchmarks/gpu.py --device cpu --small` runs the same code on a CPU.
"""
NONE = "**None was run yet**, so no number of this library comes from a GPU.\n"
PARTS = {
    "correct": "Is it right?",
    "kernel": "Exact kernels",
    "sketch": "Updates of a sketch",
    "losses": "Steps of training",
    "recipe": "The training recipe",
}


def write(source: Path, page: Path) -> None:
    """Write the page.

    Args:
        source: The path of the json, which may not exist.
        page: The page to write.
    """
    text = _sections(json.loads(source.read_text())) if source.exists() else [NONE]
    _benchmarks.put(page, "\n".join([HEAD, *text]))


def _sections(found: dict) -> Iterator[str]:
    for name, title in PARTS.items():
        yield f"## {title}\n"
        part = found.get(name)
        if part is None:
            yield "Not run.\n"
            continue
        made = {key: value for key, value in part.items() if value is not None and not isinstance(value, list)}
        yield ", ".join(f"{key} {value}" for key, value in made.items()) + "\n"
        checks = part["checks"]
        if checks:
            yield f"{sum(check['ok'] for check in checks)} of {len(checks)} checks are right.\n"
        for rows in (checks, *_alike(part["rows"])):
            yield from (f"{table}\n" for _, _, table in (_benchmarks.tables(rows) if rows else ()))


def _alike(rows: list[dict]) -> list[list[dict]]:
    """Group rows by their columns: each group becomes a table."""
    tables: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        tables.setdefault(tuple(row), []).append(row)
    return list(tables.values())
