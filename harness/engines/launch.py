"""A server that the harness starts from a checkpoint folder, on a free port of this machine, and always ends.

By default it is vLLM's own, told to say which kernels it loaded; any other program or container that speaks the completions
protocol can stand in its place, as a command with placeholders.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from harness.engines import kernel_report
from harness.engines.supervisor import GRACE_S
from harness.engines.vllm import worker_environment
from harness.errors import EngineError
from harness.provenance import package_versions
from qad.vllm_plugin import CHOICES as OURS
from qad.vllm_plugin import register

HOST = "127.0.0.1"
_LAST_WORDS = 2000
_LOOK_S = 0.25


class Launched:
    """A running server, under a supervisor that ends it whatever becomes of the harness. Close it when done.

    Args:
        command: with the placeholders of `harness.schema_server` in it.
        environment: variables beside those of the harness.
    """

    def __init__(self, command: Sequence[str], folder: Path, *, environment: dict[str, str], startup_s: float) -> None:
        self.port, self.startup_s = _free_port(), startup_s
        self.name = f"harness-{os.getpid()}-{self.port}"
        self.url = f"http://{HOST}:{self.port}/v1"
        values = {"{folder}": str(folder.resolve()), "{host}": HOST, "{port}": str(self.port), "{name}": self.name}
        self.command = [_filled(part, values) for part in command]
        self._log = tempfile.NamedTemporaryFile(prefix="harness-server-", suffix=".log", delete=False)  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.engines.supervisor", *self.command],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=os.environ | environment,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def require_running(self, waited_s: float = 0.0) -> None:
        """EngineError, with the end of the log and where the whole of it is, if the server has ended or takes too long."""
        if self._process.poll() is not None:
            what = "has ended"
        elif waited_s > self.startup_s:
            what = f"did not answer at {self.url}/models within engine.launch.startup_s = {self.startup_s:g} s"
        else:
            return
        self.close(keep_log=True)
        log = Path(self._log.name)
        end = log.read_bytes()[-_LAST_WORDS:].decode(errors="replace").strip() or "(none)"
        raise EngineError(f"the server {self.command[0]} {what}; its whole log is {log}, its last words:\n{end}")

    def close(self, *, keep_log: bool = False) -> None:
        """End the server and everything it started; a second call does nothing."""
        if self._log.closed:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S + 5)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()
        if not keep_log:
            Path(self._log.name).unlink(missing_ok=True)


def vllm_serve(options: dict[str, Any]) -> list[str]:
    """The command of vLLM's server with the options of the vllm engine. No sampling default of the checkpoint acts."""
    extension, middleware = kernel_report.LoadedKernels, kernel_report.KernelReport
    return [
        *(sys.executable, "-m", *_vllm_program(), "{folder}"),
        *(
            "--host",
            "{host}",
            "--port",
            "{port}",
            "--served-model-name",
            "{name}",
            "--dtype",
            "bfloat16",
            "--generation-config",
            "vllm",
        ),
        *("--worker-extension-cls", f"{extension.__module__}.{extension.__name__}"),
        *("--middleware", f"{middleware.__module__}.{middleware.__name__}"),
        "--disable-log-stats",
        *(word for option, value in options.items() for word in _flag(option, value)),
    ]


def require_plugin(asked: str | None, *, has_images: bool = False, has_blocks: bool = False) -> None:
    """EngineError if kernels, image processors or configurations of ours are needed and vLLM's processes would not find them."""
    found = [point.value for point in entry_points(group="vllm.general_plugins")]
    if f"{register.__module__}:{register.__name__}" in found:
        return
    if asked in OURS:
        needed = f"engine.kernels: {asked} is ours"
    elif has_images and importlib.util.find_spec("torchvision") is None:
        needed = "the image processors that do without torchvision are ours"
    elif has_blocks:
        needed = "what reads the configuration of a DeciLM model is ours"
    else:
        return
    raise EngineError(
        f"{needed}, and vLLM's processes find it by what this package declares when it is installed; "
        "install it again (pip install -e . in its folder), or use the vllm engine"
    )


def server_environment(asked: str | None, **needs: bool) -> dict[str, str]:
    """The variables of a server of ours; those that shape the vllm engine's one process are left out."""
    kept = worker_environment(asked, **needs)
    return {
        key: kept[key] for key in kept if key not in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_ALLOW_INSECURE_SERIALIZATION")
    }


def wait_between_looks(began: float) -> float:
    """Sleep until the next look at a server that is starting; seconds since `began`."""
    time.sleep(_LOOK_S)
    return time.monotonic() - began


def _vllm_program() -> tuple[str, ...]:
    """vLLM's `serve`. Its package for CPUs has another name, which the command line of vLLM does not find: the server behind it."""
    if package_versions(("vllm",))["vllm"] is not None:
        return ("vllm.entrypoints.cli.main", "serve")
    return ("vllm.entrypoints.launchers.api_server.entry", "--model")


def _flag(option: str, value: Any) -> list[str]:
    name = option.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, (dict, list)) else str(value)]


def _filled(part: str, values: dict[str, str]) -> str:
    for placeholder, value in values.items():
        part = part.replace(placeholder, value)
    return part


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])
