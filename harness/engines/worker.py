"""A process of ours that holds an engine: length-prefixed JSON over pipes, and an end that cannot be missed.

    message = 8 bytes, little-endian length, then UTF-8 JSON

A question has one reply, or a stream of them that a message {"end": true} closes.
The process is the leader of its own session, so Ctrl-C reaches the harness alone, which then ends it with all that it
started. It asks the kernel to be killed when its parent dies (Linux), so a harness that is killed leaves nothing behind.
Its standard error goes to a file, whose end is shown when something goes wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from itertools import chain
from typing import IO, Any, cast

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
        head = self._read(_LENGTH_BYTES)
        data = None if head is None else self._read(int.from_bytes(head, "little"))
        return None if data is None else dict(json.loads(data))

    def _read(self, n_bytes: int) -> bytes | None:
        """So many bytes, also of a stream that gives them in parts; None if it ends before."""
        data = bytearray()
        while len(data) < n_bytes:
            part = self._source.read(n_bytes - len(data))
            if not part:
                return None
            data += part
        return bytes(data)


class Worker:
    """The harness' side: starts the process, asks it, ends it."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [*command, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,  # what has arrived is known to select(): nothing waits in a buffer of ours
            env=os.environ | environment,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._sink = io.BufferedWriter(cast(io.RawIOBase, self._process.stdin))
        self._channel = Channel(self._process.stdout, self._sink)
        self._words = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """The reply to a message; raises as `receive`."""
        self.send(message)
        return self.receive(message["do"])

    def send(self, message: dict[str, Any]) -> None:
        """Ask without waiting for the reply. EngineError if the process has been ended."""
        if self._log.closed:
            raise EngineError(
                f"the engine process has ended; it cannot be asked to {message['do']}. Its last words:\n{self._words}"
            )
        with contextlib.suppress(OSError):  # a process that is gone is found when its reply is read
            self._channel.send(message)

    def receive(self, what: str) -> dict[str, Any]:
        """The next reply of the process, which was asked to do `what`.

        Raises:
            EngineError: the process reports a failure, or has ended; the message holds its last words.
        """
        try:
            reply = self._channel.receive()
        except OSError:
            reply = None
        if reply is None:
            self.close()
            raise EngineError(
                f"the engine process ended with status {self._process.returncode} while it was asked to {what}; "
                f"its last words:\n{self.last_words()}"
            )
        if "error" in reply:
            raise EngineError(f"the engine could not {what}: {reply['error']}")
        return reply

    def fileno(self) -> int:
        """Where its replies are read, for select()."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def last_words(self) -> str:
        """The end of what the process wrote to its standard error."""
        if self._log.closed:
            return self._words
        end = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, end - _LAST_WORDS))
        return self._log.read().decode(errors="replace").strip()

    def close(self, patience_s: float = CLOSE_SECONDS) -> None:
        """End the process and everything it started; a second call does nothing. patience_s: how long it may take by itself."""
        if self._log.closed:
            return
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._sink.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._words = self.last_words()
        self._log.close()


def stream(asked: Sequence[tuple[Worker, dict[str, Any]]]) -> Generator[dict[str, Any]]:
    """The replies of several processes, each asked for a stream of them, as they come.

    A process that is left in the middle, by an error of another or because nobody reads on, is ended.

    Raises:
        EngineError: as Worker.receive; every reply that came before has been given.
    """
    open_streams: dict[Worker, str] = {}
    try:
        for worker, message in asked:
            open_streams[worker] = message["do"]
            worker.send(message)
        while open_streams:
            for worker in select.select(list(open_streams), [], [])[0]:
                try:
                    reply = worker.receive(open_streams[worker])
                except EngineError:
                    del open_streams[worker]  # this one has said its last
                    raise
                if "end" in reply:
                    del open_streams[worker]
                else:
                    yield reply
    finally:
        for worker in open_streams:
            worker.close(patience_s=0)  # it is busy, and would not see that nobody listens


def serve(handler: Any) -> None:
    """The process' side, its whole life: for each message {"do": name, ...} call handler.<name>(**rest), reply its result.

    A handler that gives an iterator has each of its items sent when it comes. What the handler raises is replied as an error and written to
    standard error with its traceback. Standard output is kept for messages: whatever else prints is sent to standard error.
    """
    die_with_parent(int(sys.argv[1]))
    channel = Channel(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    while (message := channel.receive()) is not None:
        name = message.pop("do")
        try:
            result = getattr(handler, name)(**message)
            replies = iter([result]) if isinstance(result, dict) else chain(result, [{"end": True}])
            for reply in replies:
                channel.send(reply)
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
