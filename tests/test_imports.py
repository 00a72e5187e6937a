"""Imports point one way, and only to what the package depends on."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "alignreg"
# A module may import those in rows above its own.
ORDER = [
    {"checks", "distributed"},
    {"estimators", "targets", "sketches", "formulas", "linear"},
    {"moments", "tangents", "functional", "plotting"},
    {"population", "complexity"},
    {"metrics", "losses"},
    {"callbacks"},
]
# Inside a function, or in a module that nothing else imports, so that importing the package does not need it.
OPTIONAL = {
    "tangents": {"rich"},
    "plotting": {"matplotlib"},
    "callbacks": {"lightning", "pytorch_lightning", "transformers", "accelerate"},
}
ALLOWED = {"torch", "typing_extensions", "torchmetrics", "einops", "alignreg"} | set(sys.stdlib_module_names)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import absolutely"
            if node.module == "alignreg":
                yield from (f"alignreg.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_direction():
    rank = {name: level for level, names in enumerate(ORDER) for name in names}
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in imported(path):
            assert module.split(".")[0] in ALLOWED | OPTIONAL.get(own, set()), f"{path.name} imports {module}"
            if own != "__init__" and module.startswith("alignreg."):
                other = module.split(".")[1]
                assert rank[other] < rank[own] or other == own, f"{path.name} imports {module}"


def test_functional_never_sees_a_model():
    for name in ("functional.py", "population.py", "moments.py", "estimators.py"):
        assert not {"torch.nn", "alignreg.tangents"} & set(imported(PACKAGE / name))


def test_oracles_import_nothing_of_ours():
    for name in ("oracles.py", "complexity_oracles.py"):
        assert not any(module.startswith("alignreg") for module in imported(Path(__file__).parent / name))


def test_import_brings_nothing_optional():
    code = (
        "import sys, torch, torchmetrics; old = set(sys.modules); import alignreg, alignreg.callbacks; "
        "print(*set(sys.modules) - old)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    new = {name.split(".")[0] for name in output.split()}
    assert not new & {"accelerate", "wandb", "matplotlib", "sklearn", "datasets", "rich"}
    assert not new & {"lightning", "pytorch_lightning", "transformers"}


def test_every_class_is_final_or_abstract():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                marks = {ast.unparse(d) for d in node.decorator_list} | {ast.unparse(b) for b in node.bases}
                assert marks & {"final", "ABC", "Protocol", "NamedTuple"}, f"{path.name}: {node.name}"
