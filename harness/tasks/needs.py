"""What a task of ours needs on this machine beside its questions. Cheap to ask: nothing of it is imported."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.errors import TaskError

PACKAGES = {
    "math500": ("math_verify", "latex2sympy2_extended", "antlr4"),
    "aime24": ("math_verify", "latex2sympy2_extended", "antlr4"),
    "aime25": ("math_verify", "latex2sympy2_extended", "antlr4"),
    "ifeval": ("nltk", "langdetect", "immutabledict"),
}
_PUNKT = Path("tokenizers", "punkt_tab", "english")


def require(task: str) -> None:
    """TaskError if `missing` says something."""
    lack = missing(task)
    if lack is not None:
        raise TaskError(f"{task}: {lack}")


def missing(task: str) -> str | None:
    """Which package or data that score the answers of `task` are not here, and what to do; None: nothing is missing."""
    packages = [name for name in PACKAGES.get(task, ()) if importlib.util.find_spec(name) is None]
    if packages:
        return f"not installed: {', '.join(packages)}, which score its answers; run make install"
    if task == "ifeval" and language_data() is None:
        return (
            f"NLTK's sentence model is nowhere: {_PUNKT}/ is not in {', '.join(map(str, _places()))}. It is never downloaded in the "
            "middle of a run: unpack NLTK's punkt_tab there, name a folder that has it in NLTK_DATA, or install the package "
            "llama-index-core (--no-deps), which carries it"
        )
    return None


def language_data() -> Path | None:
    """The first folder that holds NLTK's sentence model for English, unpacked."""
    return next((place for place in _places() if (place / _PUNKT).is_dir()), None)


def _places() -> Iterator[Path]:
    """NLTK_DATA, the mirror (nltk/nltk_data), a package that carries it, then where NLTK looks by itself."""
    yield from (Path(part).expanduser() for part in os.environ.get("NLTK_DATA", "").split(os.pathsep) if part)
    if mirror := os.environ.get("HARNESS_MIRROR"):
        yield Path(mirror).expanduser() / "nltk" / "nltk_data"
    package = importlib.util.find_spec("llama_index")  # a namespace: nothing is imported
    for folder in package.submodule_search_locations or () if package else ():
        yield Path(folder) / "core" / "_static" / "nltk_cache"
    yield Path("~/nltk_data").expanduser()
    yield from (Path(sys.prefix, *parts, "nltk_data") for parts in ((), ("share",), ("lib",)))
    yield from (Path(root, "nltk_data") for root in ("/usr/share", "/usr/local/share", "/usr/lib", "/usr/local/lib"))
