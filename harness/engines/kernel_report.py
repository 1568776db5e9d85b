"""What runs inside a `vllm serve` that the harness starts: it says which kernels the loaded model computes with.

vLLM is told of both classes by options of its own, `--worker-extension-cls` and `--middleware`; any `vllm serve` that is
started with them, and can import this package, proves its kernels. Nothing else can be asked through the path. The table of
kernels is that of `vllm_worker`; nothing of vLLM is imported here.
"""

from __future__ import annotations

import json
from typing import Any

PATH = "/harness/kernels"


class LoadedKernels:
    """Joined by vLLM to its worker class."""

    def harness_kernels(self) -> dict[str, str]:
        """What computes each class of module of the worker's model."""
        from harness.engines.vllm_worker import read_kernels

        return read_kernels(self.get_model())  # type: ignore[attr-defined]  # the worker's own


class KernelReport:
    """Middleware (ASGI) that answers PATH with a list, an entry a worker, and passes everything else on."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != PATH:
            await self.app(scope, receive, send)
            return
        found = await scope["app"].state.engine_client.collective_rpc("harness_kernels")
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(found).encode()})
