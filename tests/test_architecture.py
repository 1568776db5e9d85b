"""The shape that the design notes promise. Each check is shown able to fail."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
FILES = sorted(path for package in ("harness", "qad") for path in (REPOSITORY / package).rglob("*.py"))


def imports(source: str) -> set[str]:
    """Top-level packages that a module imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def importers(package: str) -> set[str]:
    return {str(path.relative_to(REPOSITORY)) for path in FILES if package in imports(path.read_text())}


def test_imports_are_found_wherever_they_stand():
    assert imports("def f():\n    from a.b import c\nimport d.e as g") == {"a", "d"}


def test_the_core_never_imports_the_harness():
    assert not {name for name in importers("harness") if name.startswith("qad/")}
    assert {name for name in importers("qad") if name.startswith("harness/")}


def test_the_core_needs_torch_transformers_and_safetensors_alone():
    allowed = {"torch", "transformers", "safetensors", "qad", "__future__"}
    optional = {
        "qad/_numba.py": {"numba", "llvmlite", "numpy"},
        "qad/_numba_scales.py": {"numba", "numpy"},
        "qad/_triton.py": {"triton"},
        "qad/_vllm.py": {"vllm"},
    }
    import sys

    for path in FILES:
        name = str(path.relative_to(REPOSITORY))
        if name.startswith("qad/"):
            assert imports(path.read_text()) <= allowed | set(sys.stdlib_module_names) | optional.get(name, set()), name


@pytest.mark.parametrize(
    ("package", "where"),
    [
        ("lm_eval", {"harness/evaluate.py", "harness/prompts.py"}),
        ("tomllib", {"harness/toml_file.py"}),
        ("matplotlib", {"harness/plots.py"}),
        ("vllm", {"qad/_vllm.py", "harness/engines/vllm_worker.py"}),
    ],
)
def test_one_module_alone_imports(package, where):
    assert importers(package) == where


def test_modules_stay_readable():
    long = {str(path.relative_to(REPOSITORY)): n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    assert not long
    assert len((REPOSITORY / "harness" / "run.py").read_text().splitlines()) < 150
