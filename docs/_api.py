"""Writes the pages of the API reference, one for each public module, from its docstrings."""

import ast
from importlib.util import find_spec
from pathlib import Path

MODULES = (
    "alignreg",
    "alignreg.metrics",
    "alignreg.losses",
    "alignreg.functional",
    "alignreg.estimators",
    "alignreg.moments",
    "alignreg.population",
    "alignreg.sketches",
    "alignreg.targets",
    "alignreg.complexity",
    "alignreg.linear",
    "alignreg.plotting",
    "alignreg.callbacks",
)
BASES = {  # their packages do not import them, but they document what their classes share
    "alignreg.linear": "alignreg.linear.models.LinearModel",
}
PAGE = """\
# {name}

```{{eval-rst}}
.. automodule:: {name}
   :members:{members}
   :inherited-members: Metric, Module, tuple, object
   :special-members: __call__
{more}```
"""
INDEX = """\
# API reference

{rows}

```{{toctree}}
:hidden:

{pages}
```
"""


def write(folder: Path) -> None:
    """Write the pages of all modules that exist, and their index."""
    names = [name for name in MODULES if find_spec(name)]
    folder.mkdir(exist_ok=True)
    for name in names:
        more = ""
        if _source(name).name == "__init__.py":
            more = "   :imported-members:\n"  # a package shows what it imports from its files
        if name in BASES:
            more += f"\n.. autoclass:: {BASES[name]}\n"
        members = " TangentFeatures" if name == "alignreg" else ""
        _put(folder / f"{_page(name)}.md", PAGE.format(name=name, members=members, more=more))
    rows = "\n".join(f"- [{name}]({_page(name)}.md): {_summary(name)}" for name in names)
    _put(folder / "index.md", INDEX.format(rows=rows, pages="\n".join(map(_page, names))))


def _page(name: str) -> str:
    return name.rpartition(".")[2]


def _source(name: str) -> Path:
    return Path(find_spec(name).origin)


def _summary(name: str) -> str:
    return ast.get_docstring(ast.parse(_source(name).read_text())).splitlines()[0]


def _put(path: Path, text: str) -> None:
    """Write a page only if it has changed, so that a second build reads only changed pages."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
