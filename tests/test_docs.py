"""What the README shows runs as written."""

import json
import re
from pathlib import Path

import pytest
from recipe_runs import load

README = Path(__file__).parent.parent / "README.md"


def test_readme_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert 0 < float(names["metric"].compute()) < 1
    assert set(names["layers"]) == {"0", "2"}
    assert set(names["groups"].compute()) == {"easy", "difficult", "total"}
    assert len(names["metrics"].compute()) == 3


def test_links_lead_somewhere():
    for document in (README, *README.parent.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert target.startswith("https://") or (document.parent / target).exists(), target


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
    comparison, written = load("_comparison"), (README.parent / text).read_text()
    found = json.loads((README.parent / "docs" / f"{source}.json").read_text())
    assert written.count("<!-- comparison: ") == written.count("<!-- end -->") > 0
    assert comparison.filled(written, found) == written
