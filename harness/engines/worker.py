"""A process of ours that holds an engine: length-prefixed JSON over pipes, and an end that cannot be missed.

    message = 8 bytes, little-endian length, then UTF-8 JSON

The process is the leader of its own session, so Ctrl-C reaches the harness alone, which then ends it with all that it
started. It asks the kernel to be killed when its parent dies (Linux), so a harness that is killed leaves nothing behind.
Its standard error goes to a file, whose end is shown when something goes wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO, Any

from harness.errors import EngineError

_LENGTH_BYTES = 8
_PR_SET_PDEATHSIG = 1
_LAST_WORDS = 2000
CLOSE_SECONDS = 5.0
"""How long a process may take to end by itself before it is killed with its whole group."""


class Channel:
    """Messages over two binary streams."""

    def __init__(self, source: IO[bytes], sink: IO[bytes]) -> None:
        self._source, self._sink = source, sink

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        self._sink.write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
        self._sink.flush()

    def receive(self) -> dict[str, Any] | None:
        """The next message; None at the end of the stream, also in the middle of a message."""
        head = self._source.read(_LENGTH_BYTES)
        length = int.from_bytes(head, "little")
        data = self._source.read(length) if len(head) == _LENGTH_BYTES else b""
        if len(head) < _LENGTH_BYTES or len(data) < length:
            return None
        return dict(json.loads(data))


class Worker:
    """The harness' side: starts the process, asks it, ends it."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [*command, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | environment,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._channel = Channel(self._process.stdout, self._process.stdin)
        self._words = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """The reply to a message.

        Raises:
            EngineError: the process reports a failure, or has ended; the message holds its last words.
        """
        try:
            self._channel.send(message)
            reply = self._channel.receive()
        except OSError:
            reply = None
        if reply is None:
            self.close()
            raise EngineError(
                f"the engine process ended with status {self._process.returncode} while it was asked to {message['do']}; "
                f"its last words:\n{self.last_words()}"
            )
        if "error" in reply:
            raise EngineError(f"the engine could not {message['do']}: {reply['error']}")
        return reply

    def last_words(self) -> str:
        """The end of what the process wrote to its standard error."""
        if self._log.closed:
            return self._words
        end = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, end - _LAST_WORDS))
        return self._log.read().decode(errors="replace").strip()

    def close(self) -> None:
        """End the process and everything it started; a second call does nothing."""
        if self._log.closed:
            return
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._words = self.last_words()
        self._log.close()


def serve(handler: Any) -> None:
    """The process' side, its whole life: for each message {"do": name, ...} call handler.<name>(**rest), reply its result.

    What the handler raises is replied as an error and written to standard error with its traceback. Standard output is kept
    for messages: whatever else prints is sent to standard error.
    """
    die_with_parent(int(sys.argv[1]))
    channel = Channel(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    while (message := channel.receive()) is not None:
        name = message.pop("do")
        try:
            channel.send(getattr(handler, name)(**message))
        except Exception as error:  # reported to the harness, which raises it
            import traceback

            traceback.print_exc()
            channel.send({"error": f"{type(error).__name__}: {error}"})


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, or end now if that has happened already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
