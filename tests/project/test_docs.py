"""What the README and the pages of the documentation show runs as written, and is found."""

import ast
import importlib.util
import json
import re

import pytest
from pages import python_blocks, run_blocks
from paths import BENCHMARKS, DOCS, PACKAGE, README, ROOT
from recipe_runs import load

WRITTEN = ("_build", "api", "learn")  # by the build of the site
PAGES = [
    page
    for page in sorted(DOCS.rglob("*.md"))
    if page.relative_to(DOCS).parts[0] not in (*WRITTEN, "benchmarks.md", "gpu.md")
]


def module(path):
    """A file that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}{path.stem}", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def generator(name):
    return module(DOCS / f"{name}.py")


ELSEWHERE = {"adapters.md"}  # needs packages that not all tests have: test_callbacks.py


@pytest.mark.parametrize(
    "page", [p for p in PAGES if python_blocks(p) and p.name not in ELSEWHERE], ids=lambda page: page.name
)
def test_python_of_the_pages_runs(page):
    run_blocks(page)


def test_every_page_is_in_a_table_of_contents():
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", (DOCS / "index.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert len(listed) == len(set(listed))
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES}
    assert pages - {"index"} == set(listed) - {"learn/index", "api/index", "benchmarks", "gpu"}


def test_every_public_module_has_a_page():
    package = ast.parse((PACKAGE / "__init__.py").read_text())
    imports = [node for node in package.body if isinstance(node, ast.ImportFrom) and node.module == "alignreg"]
    modules = {f"alignreg.{name.name}" for node in imports for name in node.names}
    assert len(modules) > 5
    assert {"alignreg", "alignreg.plotting", *modules} <= set(generator("_api").MODULES)


def test_tables_of_benchmarks():
    tables = generator("_benchmarks").tables
    rows = [{"network": "MLP", "seconds": 0.01234}, {"network": "CNN", "error": "a | b"}]
    lines = ["| network | seconds | error |", "| --- | --- | --- |", "| MLP | 0.0123 |  |", "| CNN |  | a \\| b |"]
    assert list(tables({"threads": 1, "rows": rows})) == [((), "threads 1", "\n".join(lines))]
    runs = [[{"step": 3, "value": value}] for value in (0.2, 0.4)]
    assert list(tables({"part": runs})) == [
        (("part",), "2 runs", "| step | value |\n| --- | --- |\n| 3 | 0.30\xa0±\xa00.10 |")
    ]
    assert list(tables([{"accuracies": [1.0, 3.0]}])) == [
        ((), "", "| accuracies |\n| --- |\n| 2.0\xa0±\xa01.0 (of 2) |")
    ]
    with pytest.raises(TypeError, match="expected rows"):
        list(tables({"part": [1, 2]}))


def test_page_of_benchmarks_has_each_command(tmp_path):
    page = tmp_path / "benchmarks.md"
    generator("_benchmarks").write(BENCHMARKS, page)
    found = page.read_text()
    for benchmark in BENCHMARKS.glob("*.json"):
        assert f"\npython benchmarks/{benchmark.stem}.py" in found
    assert found.count("\n## ") == len(list(BENCHMARKS.glob("*.json")))


def test_readme_python_runs():
    assert len(python_blocks(README)) == 5
    names = run_blocks(README)
    assert 0 < float(names["metric"].compute()) < 1
    assert set(names["layers"]) == {"0", "2"}
    assert set(names["groups"].compute()) == {"easy", "difficult", "total"}
    assert len(names["metrics"].compute()) == 3


def test_links_lead_somewhere():
    for document in (README, *PAGES):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            of_the_site = target in ("learn/index.rst", "api/index.md", "benchmarks.md", "gpu.md")
            assert target.startswith("https://") or of_the_site or (document.parent / target).exists(), target


def test_tables_of_training_are_those_of_its_json():
    tables, written = module(BENCHMARKS / "_training_tables.py"), (DOCS / "losses.md").read_text()
    found = json.loads((BENCHMARKS / "training.json").read_text())
    assert written.count("<!-- training: ") == written.count("<!-- end -->") == len(tables.TABLES)
    assert tables.filled(written, found) == written


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("README.md", "comparison"),
        ("docs/comparison.md", "comparison"),
        ("docs/variants-few100.md", "variants-few100"),
        ("docs/variants-noise40.md", "variants-noise40"),
    ],
)
def test_tables_of_the_comparison_are_those_of_its_json(text, source):
    comparison, written = load("comparison.report"), (ROOT / text).read_text()
    found = json.loads((DOCS / f"{source}.json").read_text())
    assert written.count("<!-- comparison: ") == written.count("<!-- end -->") > 0
    assert comparison.filled(written, found) == written
