"""An engine process without an engine: for tests of starting, asking and ending one."""

import os
import subprocess
import sys
import time

from harness.engines.worker import serve


class Server:
    def echo(self, value):
        print("noise on standard output")
        return {"value": value, "pid": os.getpid()}

    def fail(self):
        raise RuntimeError("no such luck")

    def die(self):
        print("last words", file=sys.stderr, flush=True)
        os._exit(7)

    def spawn(self):
        return {"pid": subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid}

    def hang(self):
        time.sleep(600)

    def load(self, folder, options):
        return {"kernels": {"linear": os.environ["FAKE_LINEAR"], "kv_cache": "bf16"}, "vllm": "fake"}

    def generate(self, requests, eos_ids):
        with open(os.environ["FAKE_STARTED"], "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)

    def likelihood(self, requests):
        return {"likelihoods": [[None, False] for _ in requests]}


if __name__ == "__main__":
    serve(Server())
