"""The engine that a suite asks for, with one checkpoint at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness import loading
from harness.engines.experts import refusal
from harness.engines.hf import HfEngine
from harness.engines.launch import require_plugin
from harness.engines.server import ServerEngine, key_of
from harness.engines.vllm import (
    VllmEngine,
    needs_of,
    require_architecture,
    require_servable,
    serves_on_cpu,
    vllm_options,
)
from harness.models import text_config_with_defaults
from harness.processor import load_processor
from harness.schema import Engine
from harness.schema_server import Endpoint
from qad.checkpoint import Loaded
from qad.experts import EXPERT
from qad.packed import read_config
from qad.recipe import Targets


class Serving:
    """Makes engines; a process or server of ours stays up for the next task of the same checkpoint. Close it when done.

    Args:
        endpoints: the servers that the variants name, in place of those that kind "server" would start.
        records: folder for what is known of those servers, beside the journals.
        trust_remote_code: run the Python files of a model's folder, in this process for its tokenizer and processor and in vLLM's.
    """

    def __init__(
        self,
        section: Engine,
        *,
        endpoints: tuple[Endpoint, ...] = (),
        records: Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.section, self.endpoints, self.records, self.trusts = section, endpoints, records, trust_remote_code
        self._served: tuple[tuple[str, Endpoint | None], VllmEngine | ServerEngine] | None = None

    def require(self, folder: Path) -> None:
        """EngineError, before anything is loaded, if the engine cannot serve the checkpoint in `folder`."""
        for endpoint in self.endpoints:
            key_of(endpoint)
        if self._is_vllm and self.section.kind == "server":
            require_plugin(self.section.kernels, **needs_of(folder))
        if self._is_vllm:
            require_servable(folder, kernels=self.section.kernels, args=self.section.args, trust_remote_code=self.trusts)
            require_architecture(folder)

    def require_layers(self, variant: str, targets: Targets) -> None:
        """EngineError if the engine cannot compute what a recipe quantizes of a variant, which has yet to be made."""
        experts = [name for group in targets.groups for name in group.members if group.format == "nvfp4" and EXPERT.match(name)]
        if experts and self._is_vllm and serves_on_cpu():
            raise refusal(f"variant {variant}: {experts[0]}")

    @property
    def _is_vllm(self) -> bool:
        """Whether a vLLM of this environment answers, in a process of ours or as a server that is started by default."""
        has_own_command = self.section.launch is not None and self.section.launch.command is not None
        return self.section.kind == "vllm" or (self.section.kind == "server" and not self.endpoints and not has_own_command)

    def context_length(self, folder: Path) -> int | None:
        """Tokens that the engine will hold with a model such as the one in `folder`; None where a server decides, or only the model itself says."""
        if self.section.kind == "hf":
            length: int | None = text_config_with_defaults(read_config(folder)).get("max_position_embeddings")
            return length
        if self._is_vllm:
            return int(vllm_options(folder, kernels=None, args=self.section.args)["max_model_len"]) - 1
        return None

    @property
    def max_images(self) -> int | None:
        """Images that a prompt may have, by the suite's arguments for vLLM; None without a limit of their own."""
        limit: int | None = self.section.args.get("limit_mm_per_prompt", {}).get("image") if self._is_vllm else None
        return limit

    def engine(
        self, key: str, folder: Path, load: Callable[[], Loaded], *, weights: str = "", endpoint: Endpoint | None = None
    ) -> HfEngine | VllmEngine | ServerEngine:
        """The engine with the checkpoint `key` in `folder`.

        Args:
            load: gives it in memory, where the engine needs that.
            weights: its fingerprint; endpoint: the server that is said to serve it.
        """
        if self._served is not None and self._served[0] == (key, endpoint):
            return self._served[1]
        section, tokenizer = self.section, loading.load_tokenizer(folder, trust_remote_code=self.trusts)
        eos_ids = loading.eos_ids(folder, tokenizer)
        if section.kind == "hf":
            return HfEngine(
                load(),
                tokenizer,
                eos_ids=eos_ids,
                args=section.args,
                processor=lambda: load_processor(folder, trust_remote_code=self.trusts),
            )
        self.close()
        engine: VllmEngine | ServerEngine
        if section.kind == "vllm":
            engine = VllmEngine(
                folder,
                tokenizer,
                eos_ids=eos_ids,
                kernels=section.kernels,
                args=section.args,
                trust_remote_code=self.trusts,
            )
        else:
            engine = ServerEngine(
                folder,
                tokenizer,
                eos_ids=eos_ids,
                weights=weights,
                kernels=section.kernels,
                args=section.args,
                records=self.records,
                launch=section.launch,
                endpoint=endpoint,
                trust_remote_code=self.trusts,
            )
        self._served = ((key, endpoint), engine)
        return engine

    def close(self) -> None:
        """End the process or server of ours, if there is one."""
        if self._served is not None:
            self._served[1].close()
            self._served = None
