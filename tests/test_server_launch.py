"""A server that the harness starts: found when it is ready, told what to serve, and never left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_server import no_network  # noqa: F401  (loopback alone)

from harness import loading
from harness.engines import Answer, Request, Sampling
from harness.engines import launch as launch_of_servers
from harness.engines import server as server_engine
from harness.engines.kernel_report import PATH, KernelReport
from harness.engines.launch import Launched, require_plugin, vllm_serve
from harness.engines.server import KERNELS_UNVERIFIED, ServerEngine
from harness.engines.serving import Serving
from harness.errors import EngineError
from harness.schema import Engine
from harness.schema_server import Endpoint, Launch

FAKE = str(Path(__file__).parent / "fault_server.py")
COMMAND = (sys.executable, FAKE, "{port}", "{name}", "{folder}")
REPOSITORY = str(Path(__file__).parent.parent)


@pytest.fixture(autouse=True)
def logs_of_its_own(tmp_path, monkeypatch):
    """A log that outlives its server stays among the files of the test."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid, seconds=20):
    until = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not is_alive(pid)


def launch(folder, tokenizer, *, command=COMMAND, startup_s=60.0, **settings):
    return ServerEngine(
        folder,
        tokenizer,
        eos_ids=loading.eos_ids(folder, tokenizer),
        weights="w",
        kernels=None,
        args={"retries": 0},
        launch=Launch(command=command, startup_s=startup_s),
        **settings,
    )


def children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def test_a_server_of_the_users_own_is_started_asked_and_ended(tiny_model, tiny_tokenizer):
    engine = launch(tiny_model, tiny_tokenizer)
    try:
        supervisor = engine._launched.pid
        (server,) = children(supervisor)
        words = Path(f"/proc/{server}/cmdline").read_text().split("\0")
        assert words[4] == str(tiny_model.resolve()) and words[3] == engine.model != "{name}"
        ((place, answer),) = engine.answer([Request(token_ids=(20, 30), sampling=Sampling(max_tokens=3, until=()))])
        assert place == 0 and isinstance(answer, Answer) and len(answer.token_ids) == 3
        assert engine.kernels == {"linear": "unverified bf16", "kv_cache": "unverified bf16"}
        assert engine.flags == (KERNELS_UNVERIFIED,)
        assert engine.protocol["command"] == list(COMMAND) and engine.model not in str(engine.protocol)
    finally:
        engine.close()
    assert ends(supervisor) and ends(server)
    engine.close()


def test_a_server_that_ends_before_it_answers_is_an_error_with_its_last_words(tiny_model, tiny_tokenizer):
    command = (sys.executable, "-c", "import sys; print('no memory left'); sys.exit(3)", "{port}", "{folder}")
    with pytest.raises(
        EngineError,
        match=r"has ended; its whole log is (\S+),[^$]*no memory left\nthe server ended with status 3",
    ) as caught:
        launch(tiny_model, tiny_tokenizer, command=command)
    log = Path(str(caught.value).split("whole log is ")[1].split(",")[0])
    assert "no memory left" in log.read_text()


def test_a_server_that_ends_under_its_requests_is_an_error_with_its_last_words(tiny_model, tiny_tokenizer):
    engine = launch(tiny_model, tiny_tokenizer)
    (server,) = children(engine._launched.pid)
    os.kill(server, signal.SIGKILL)
    assert ends(server) and ends(engine._launched.pid)
    batch = [Request(token_ids=(20, 30 + i), sampling=Sampling(max_tokens=3, until=())) for i in range(20)]
    with pytest.raises(EngineError, match=r"(?s)has ended; its whole log is .*ready soon\nthe server ended with status -9"):
        list(engine.answer(batch))
    engine.close()


def test_a_program_that_is_not_there_is_an_error_that_names_it(tiny_model, tiny_tokenizer):
    with pytest.raises(EngineError, match="no-such-program: cannot be started: No such file"):
        launch(tiny_model, tiny_tokenizer, command=("no-such-program", "{port}", "{folder}"))


def test_a_server_that_never_answers_is_ended_after_its_time(tiny_model, tiny_tokenizer, monkeypatch):
    started = []
    monkeypatch.setattr(server_engine, "Launched", lambda *a, **k: started.append(Launched(*a, **k)) or started[-1])
    command = (sys.executable, "-c", "import time; time.sleep(600)", "{port}", "{folder}")
    with pytest.raises(
        EngineError, match="did not answer at http://127.0.0.1:.*/v1/models within engine.launch.startup_s = 0.5 s"
    ):
        launch(tiny_model, tiny_tokenizer, command=command, startup_s=0.5)
    assert ends(started[0].pid)


PARENT = """
import sys, time
from pathlib import Path
from harness.engines.launch import Launched
server = Launched([sys.executable, "-c", "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"],
                  Path("."), environment={}, startup_s=60)
print(server.pid, flush=True)
time.sleep(600)
"""


def test_nothing_is_left_when_the_harness_is_killed(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": REPOSITORY, "TMPDIR": str(tmp_path)},
    )
    supervisor = int(parent.stdout.readline())
    until = time.monotonic() + 20
    family = []
    while len(family) < 2 and time.monotonic() < until:
        family = children(supervisor)
        family += [grandchild for child in family for grandchild in children(child)]
    assert len(family) == 2 and all(map(is_alive, family))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert all(ends(pid) for pid in (supervisor, *family))


def test_vllm_is_started_with_its_defaults_and_those_of_checkpoints_switched_off():
    command = " ".join(
        vllm_serve({"max_model_len": 64, "enforce_eager": True, "enable_prefix_caching": False, "kv_cache_dtype": "fp8"})
    )
    for part in (
        "{folder} --host {host} --port {port} --served-model-name {name} --dtype bfloat16 --generation-config vllm",
        "--worker-extension-cls harness.engines.kernel_report.LoadedKernels --middleware harness.engines.kernel_report.KernelReport",
        "--max-model-len 64 --enforce-eager --no-enable-prefix-caching --kv-cache-dtype fp8",
    ):
        assert part in command


def test_the_report_answers_its_own_path_and_passes_others_on():
    import asyncio
    import types

    class Client:
        async def collective_rpc(self, method):
            return [{"linear": method}]

    sent, passed = [], []

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        passed.append(scope["path"])

    state = types.SimpleNamespace(state=types.SimpleNamespace(engine_client=Client()))
    for path in (PATH, "/v1/models"):
        asyncio.run(KernelReport(app)({"type": "http", "path": path, "app": state}, None, send))
    assert sent[0]["status"] == 200 and sent[1]["body"] == b'[{"linear": "harness_kernels"}]'
    assert passed == ["/v1/models"]


def test_kernels_that_the_server_names_are_held_against_those_asked_for(tiny_model, tiny_tokenizer, monkeypatch):
    for said, flags, error in (
        ([{"linear": "bf16", "kv_cache": "bf16"}], (), None),
        (
            [{"linear": "w4a16", "kv_cache": "bf16"}],
            (),
            "asks for bf16, but the linear layers that vLLM loaded compute with w4a16",
        ),
        (
            [{"linear": "bf16", "kv_cache": "bf16"}, {"linear": "w4a16"}],
            (),
            "the workers of one model compute with different kernels",
        ),
        ({"detail": "Not Found"}, (KERNELS_UNVERIFIED,), None),
    ):
        real = server_engine.Completions.get

        async def get(self, path, *, retries=None, said=said, real=real):
            return said if path == PATH else await real(self, path, retries=retries)

        with monkeypatch.context() as patch:
            patch.setattr(server_engine.Completions, "get", get)
            if error:
                with pytest.raises(EngineError, match=error):
                    launch(tiny_model, tiny_tokenizer)
                continue
            engine = launch(tiny_model, tiny_tokenizer)
            engine.close()
            assert engine.flags == flags and (
                engine.kernels == said[0] if not flags else "unverified" in engine.kernels["linear"]
            )


def test_kernels_of_ours_need_this_package_installed(tiny_model, monkeypatch):
    monkeypatch.setattr(launch_of_servers, "entry_points", lambda group: [])
    require_plugin("native")
    message = "w4a16 is ours, and vLLM's processes find it by .* install it again"
    with pytest.raises(EngineError, match=message):
        require_plugin("w4a16")
    with pytest.raises(EngineError, match=message):
        Serving(Engine(kind="server", kernels="w4a16")).require(tiny_model)


def test_the_context_is_known_beforehand_where_the_harness_starts_vllm(tiny_model):
    given = Endpoint(url="http://localhost/v1", model="m")
    own = Launch(command=("serve", "{folder}", "{port}"))
    assert Serving(Engine(kind="server", args={"max_model_len": 300})).context_length(tiny_model) == 299
    assert Serving(Engine(kind="server", launch=own)).context_length(tiny_model) is None
    assert Serving(Engine(kind="server"), endpoints=(given,)).context_length(tiny_model) is None
