"""The engine that a suite asks for, with one checkpoint at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness import loading
from harness.engines.hf import HfEngine
from harness.engines.vllm import VllmEngine, require_servable
from harness.schema import Engine
from qad.checkpoint import Loaded


class Serving:
    """Makes engines; vLLM's process stays up for the next task of the same checkpoint. Close it when done."""

    def __init__(self, section: Engine) -> None:
        self.section = section
        self._served: tuple[str, VllmEngine] | None = None

    def require(self, folder: Path) -> None:
        """EngineError, before anything is loaded, if the engine cannot serve the checkpoint in `folder`."""
        if self.section.kind == "vllm":
            require_servable(folder, kernels=self.section.kernels, args=self.section.args)

    def engine(self, key: str, folder: Path, load: Callable[[], Loaded]) -> HfEngine | VllmEngine:
        """The engine with the checkpoint `key` in `folder`; `load` gives it in memory, where the engine needs that."""
        if self._served is not None and self._served[0] == key:
            return self._served[1]
        tokenizer = loading.load_tokenizer(folder)
        eos_ids = loading.eos_ids(folder, tokenizer)
        if self.section.kind == "hf":
            return HfEngine(load(), tokenizer, eos_ids=eos_ids, args=self.section.args)
        self.close()
        engine = VllmEngine(folder, tokenizer, eos_ids=eos_ids, kernels=self.section.kernels, args=self.section.args)
        self._served = (key, engine)
        return engine

    def close(self) -> None:
        """End vLLM's process, if there is one."""
        if self._served is not None:
            self._served[1].close()
            self._served = None
