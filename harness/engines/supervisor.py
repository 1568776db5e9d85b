"""A process that holds a server: ends it, and everything it started, when its own standard input ends.

    python -m harness.engines.supervisor PROGRAM ARGUMENT...

`harness.engines.launch` starts it as the leader of its own session and keeps the other end of the pipe, which closes however
the harness ends, kill -9 included. The server first gets SIGTERM, so that a container's client can stop the container; what
is left of the group after GRACE_S is killed, the supervisor with it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

GRACE_S = 10.0
"""How long a server may take to end by itself."""
_LOOK_S = 0.2


def supervise(command: list[str]) -> int:
    """Run the command until it ends or standard input does; its status. Kills the whole group of processes at the end."""
    try:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"{command[0]}: cannot be started: {error.strerror}", file=sys.stderr, flush=True)
        return 127
    while server.poll() is None:
        readable, _, _ = select.select([0], [], [], _LOOK_S)
        if readable and not os.read(0, 1):
            server.terminate()
            break
    until = time.monotonic() + GRACE_S
    while server.poll() is None and time.monotonic() < until:
        time.sleep(_LOOK_S / 4)
    print(f"the server ended with status {server.poll()}", file=sys.stderr, flush=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
