"""Every module of qad that the sources of a kind of stage import is a source of it too, or its absence is deliberate and has a reason."""

import ast
from functools import cache

import pytest

from harness.numerics import ROOT, SOURCES

HUB = "harness/stages.py"
"""Does the stages of every kind, and so imports what each of them needs: from here nothing follows about one kind."""
KINDS = [
    ("model",), ("data",), ("data", "generate"), ("data", "generate", "vllm"), ("data", "generate", "vllm", "server"), ("calibrate",),
    ("quantize",), ("train",), ("select",), ("select", "vllm"), ("select", "vllm", "server"), ("prepare",), ("evaluate",), ("evaluate", "vllm"),
    ("evaluate", "vllm", "server"), ("judge",), ("judge", "vllm"), ("judge", "vllm", "server"), ("score",), ("diagnostics",),
]  # fmt: skip
"""The kinds whose versions are in the key of a stage together: an engine and generation add theirs to the stage's own."""
NO_NUMBERS = {"errors": "messages alone", "footprint": "sizes of files, for reports"}
FORMAT = (
    "_numba",
    "_triton",
    "exceptions",
    "fp8",
    "kernels",
    "kv_cache",
    "modules",
    "nvfp4",
    "recipe",
    "scales",
    "straight_through",
)
CHOICE = ("_numba_scales", "gptq", "observe")
ABSENT = {
    "model": ((*FORMAT, *CHOICE), "a GGUF file becomes BF16 weights: nothing is quantized"),
    "data": (
        (*FORMAT, *CHOICE, "backbone", "building", "checkpoint", "decilm", "experts", "layouts", "packed", "remote_code",
         "stored_names", "tensor_files"),
        "text becomes tokens; a model that writes text is of kind generate, and its weights are BF16",
    ),
    "generate": ((*FORMAT, *CHOICE, "layouts", "packed"), "the model that writes is BF16"),
    "calibrate": ((*FORMAT, *CHOICE), "inputs of the BF16 model are observed"),
    "train": (CHOICE, "block scales and codes to start from were chosen when PTQ was made, which is an input"),
    "select": (CHOICE, "as in training"),
    "evaluate": (CHOICE, "codes are read from the checkpoint, which is an input"),
    "judge": (CHOICE, "as in answering"),
    "diagnostics": (CHOICE, "as in answering"),
}  # fmt: skip
"""By kind: modules that its sources import and that decide none of its numbers, and why."""
TRAINED_ALONE = ("packing", "ranks")
"""Rows are packed, and weights are spread over ranks, in training; elsewhere both are passed through."""


@cache
def imported(source: str) -> frozenset[str]:
    """The files of qad that a file imports by name."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
        elif isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
    files = {f"{name.replace('.', '/')}.py" for name in names if name.startswith("qad.")}
    return frozenset(file for file in files if (ROOT / file).is_file())


def reached(sources: set[str]) -> set[str]:
    """The modules of qad that `sources` import, and those that these import."""
    seen: set[str] = set()
    ahead = [source for source in sources if source != HUB]
    while ahead:
        for file in imported(ahead.pop()) - seen:
            seen.add(file)
            ahead.append(file)
    return seen


def lacking(kinds: tuple[str, ...]) -> set[str]:
    sources = {source for kind in kinds for source in SOURCES[kind]}
    return {file.removeprefix("qad/").removesuffix(".py") for file in reached(sources) - sources}


def allowed(kinds: tuple[str, ...]) -> set[str]:
    passed_through = () if "train" in kinds else TRAINED_ALONE
    return {*NO_NUMBERS, *passed_through, *ABSENT.get("generate" if "generate" in kinds else kinds[0], ((), ""))[0]}


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_what_the_sources_of_a_kind_import_of_the_core_is_a_source_too_or_absent_for_a_reason(kinds):
    assert sorted(lacking(kinds) - allowed(kinds)) == []


def test_no_reason_outlives_its_module_and_every_kind_is_looked_at():
    assert {kind for kinds in KINDS for kind in kinds} == set(SOURCES)
    found = {kind: lacking((kind,)) for kind in SOURCES}
    for kind, (modules, _) in ABSENT.items():
        assert set(modules) & found[kind], kind
    named = {*NO_NUMBERS, *TRAINED_ALONE, *(module for modules, _ in ABSENT.values() for module in modules)}
    assert sorted(named - set.union(*found.values())) == []
