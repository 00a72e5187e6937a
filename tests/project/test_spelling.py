"""The project is written in American English, as torch is: in names and in prose."""

import re
from pathlib import Path

import pytest
from paths import ROOT

SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".cff"}
FOLDERS = ("alignreg", "recipes", "tests", "benchmarks", "docs", ".github")
GENERATED = {"_build", "api", "learn", "benchmarks.md", "gpu.md"}
BRITISH = re.compile(
    r"""
    (normal|optim(?!ist)|regular|minim|maxim|initial|vector|penal|parametr|parameter|summar|general|recogn|organ
      |standard|memor|linear|synchron|serial|visual|factor|symmetr|discret|special)is(e|ed|es|er|ers|ing|ation|ations)\b
    |(behavi|neighb|fav|col|hon)our
    |cent(re|red|res|ring)\b
    |((?<!de)cancel|model|label|travel)l(ed|ing)\b
    |\b(artefact|grey|spelt|learnt|whilst|catalogue|judgement)
    """,
    re.VERBOSE | re.IGNORECASE,
)


def files():
    yield from (path for path in ROOT.iterdir() if path.suffix in SUFFIXES)
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SUFFIXES and not GENERATED & set(path.relative_to(ROOT / folder).parts):
                yield path


def british(text):
    return [match[0] for match in BRITISH.finditer(text)]


@pytest.mark.parametrize(
    "word", ["Optimiser", "vectorised", "centring", "behaviour", "unlabelled", "reparametrisation"]
)
def test_what_is_found(word):
    assert british(f"an {word},")


def test_words_that_are_spelled_alike_everywhere():
    assert not british("optimistic, precise, enterprise, four hours, centered, promises, labels, raise, color")


def test_american_spelling():
    odd = {
        f"{path.relative_to(ROOT)}: {word}"
        for path in files()
        if path != Path(__file__)
        for word in british(path.read_text(encoding="utf-8"))
    }
    assert not odd
