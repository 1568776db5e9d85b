"""The process that holds vLLM, able to load one model after another: for tests that share its start.

vLLM replaces Triton kernels of its own once more for each model, and fails over modules that answering has loaded since.
"""

import gc
import os

from harness.engines.vllm_worker import Server
from harness.engines.worker import serve


class ManyModels(Server):
    def load(self, folder, options):
        import vllm.distributed
        from vllm.platforms import current_platform

        if hasattr(self, "llm"):
            self.llm.llm_engine.engine_core.shutdown()
            del self.llm
            gc.collect()  # now, or its end would end what the next model has set up
            vllm.distributed.cleanup_dist_env_and_memory()
        found = super().load(folder, options)
        type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
        return found


if __name__ == "__main__":
    serve(ManyModels())
    os._exit(0)
