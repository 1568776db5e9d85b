"""An engine process without an engine: for tests of starting, asking and ending one."""

import json
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
        settings = json.loads(os.environ.get("FAKE_SETTINGS", "{}"))
        return {"kernels": {"linear": os.environ["FAKE_LINEAR"], "kv_cache": "bf16"}, "vllm": "fake", "settings": settings}

    def count(self, n, then="end"):
        """n messages, then what `then` says: the end, an error, death or a long wait."""
        for i in range(n):
            yield {"n": i, "pid": os.getpid()}
        if then != "end":
            getattr(self, then)()

    def answer(self, prompts, media, requests, eos_ids):
        """A response for each of the first FAKE_ANSWERS requests, the last one first; then what FAKE_THEN says."""
        if "FAKE_STARTED" in os.environ:
            with open(os.environ["FAKE_STARTED"], "w") as file:
                file.write(str(os.getpid()))
        for request in reversed(requests[: int(os.environ.get("FAKE_ANSWERS", len(requests)))]):
            found = {"logprob": None, "is_greedy": False}
            if "max_tokens" in request:
                found = {"token_ids": [*prompts[request["prompt"]][:2], eos_ids[0]]}
            yield {"place": request["place"], "seconds": 0.0, **found}
        if os.environ.get("FAKE_THEN"):
            getattr(self, os.environ["FAKE_THEN"])()


if __name__ == "__main__":
    serve(Server())
