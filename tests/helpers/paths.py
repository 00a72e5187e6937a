"""Where the files of the repository are."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "alignreg"
RECIPES = ROOT / "recipes"
DOCS = ROOT / "docs"
BENCHMARKS = ROOT / "benchmarks"
README = ROOT / "README.md"
HELPERS = ROOT / "tests" / "helpers"
DATA = ROOT / "tests" / "data"
