"""Sphinx configuration; `make docs` builds into docs/_build/html."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

from sphinx_gallery.sorting import ExplicitOrder

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import _api
import _benchmarks
import _gpu

import alignreg

project = "alignreg"
author = "The alignreg developers"
copyright = author
release = version = alignreg.__version__

_api.write(HERE / "api")
_benchmarks.write(HERE.parent / "benchmarks", HERE / "benchmarks.md")
_gpu.write(HERE.parent / "benchmarks" / "gpu.json", HERE / "gpu.md")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "tutorials"]
highlight_language = "none"  # indented blocks are diagrams and formulas; code blocks name their language

myst_heading_anchors = 4

html_theme = "furo"
html_title = "alignreg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_mock_imports = [name for name in ("lightning", "pytorch_lightning", "transformers") if find_spec(name) is None]
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
napoleon_use_rtype = False

# The build does not use the network, so names from other libraries have no page to link to.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|torchmetrics|collections|lightning|transformers)\..*|Tensor|module")]

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "learn",
    "within_subsection_order": ExplicitOrder(
        ["plot_monitor.py", "plot_regularize.py", "plot_compare.py", "plot_own_model.py"]
    ),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "capture_repr": (),  # show what is printed, not the value of the last line
    "show_memory": False,
    "write_computation_times": False,
    "show_signature": False,
    "remove_config_comments": True,
    "image_scrapers": ("matplotlib",),
    "matplotlib_animations": False,
}


def escape_absolute_values(app, what, name, obj, options, lines):
    """Keep |x| in a docstring from being read as a substitution."""
    lines[:] = [line if line.lstrip().startswith(">>>") else re.sub(r"\|(\w+)\|", r"\|\1\|", line) for line in lines]


def find_by_last_name(app, env, node, contnode):
    """Resolve the defining path of a class, or its bare name, to where it is documented, if the name is unique."""
    if node.get("refdomain") != "py":
        return None
    last = node["reftarget"].rpartition(".")[2]
    objects = env.domains.python_domain.objects
    kinds = ("class", "exception")
    found = [name for name, at in objects.items() if name.rpartition(".")[2] == last and at.objtype in kinds]
    if len(found) != 1:
        return None
    return env.domains.python_domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, contnode)


def setup(app):
    """Connect both functions to Sphinx."""
    app.connect("autodoc-process-docstring", escape_absolute_values)
    app.connect("missing-reference", find_by_last_name)
