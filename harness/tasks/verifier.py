"""Whether two mathematical answers are the same, by math_verify, in a process that may be ended.

The gold comes first: math_verify is not symmetric. Works in any thread. A pair on which math_verify takes more than `LIMIT_S` of
processor time (not of the clock: a busy machine changes no score) or `MEMORY_BYTES` of address space has no verdict.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

from harness.errors import TaskError

LIMIT_S = 10.0
MEMORY_BYTES = 4 * 1024**3
_CLOCK_S = 300.0
"""Time by the clock after which a process that uses no processor is ended too; and that it has to start."""


class Verifier:
    """One such process, started when it is first asked and again after it was ended."""

    def __init__(self, *, limit_s: float = LIMIT_S, memory_bytes: int = MEMORY_BYTES) -> None:
        self._arguments = [str(limit_s), str(memory_bytes)]
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def same(self, gold: str, answer: str) -> bool | None:
        """Whether `answer` says what `gold` says, both LaTeX; None if there was no verdict within the limits.

        Raises:
            TaskError: math_verify is not installed or does not start.
        """
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                process.stdin.flush()
                reply = _line(process)
            except BrokenPipeError:
                reply = b""
            if not reply:
                self.close()
                return None
            return bool(json.loads(reply))

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid():
            return self._process
        if importlib.util.find_spec("math_verify") is None:
            raise TaskError("math_verify is not installed, which scores mathematical answers; run make install")
        worker = Path(__file__).with_name("verifier_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(worker), *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._owner = os.getpid()
        if _line(self._process) != b"ready\n":
            self._process.kill()
            said = self._process.communicate()[1].decode(errors="replace").strip().splitlines()
            self._process = None
            raise TaskError(f"math_verify does not start: {said[-1] if said else 'it said nothing'}; run make install again")
        return self._process


@lru_cache(maxsize=1)
def _verifier() -> Verifier:
    return Verifier()


@lru_cache(maxsize=100_000)
def same_answer(gold: str, answer: str) -> bool | None:
    """As `Verifier.same`, by one process for all; a pair is asked once."""
    return _verifier().same(gold, answer)


def _line(process: subprocess.Popen[bytes]) -> bytes:
    """The next reply, or nothing from a process that ended or that says nothing for too long."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], _CLOCK_S)
    return process.stdout.readline() if ready else b""
