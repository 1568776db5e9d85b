"""The hub where there is no network: one message, at once, and caches that still work."""

import logging
import socket

import datasets
import pytest
from huggingface_hub import constants

from harness import hub
from harness.errors import DataError, ModelError, TaskError
from harness.hub import reading_hub
from harness.models import download
from harness.row_files import RowFiles, read_rows
from harness.schema import Model
from harness.schema_data import Hub
from tests.asking import prepare, task

COMMIT = "a" * 40


@pytest.fixture
def no_name_server(monkeypatch):
    """The libraries are not told that they are offline, no name is known, and nothing may wait."""

    def unknown(*arguments):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    hub._unknown_host.cache_clear()
    yield
    hub._unknown_host.cache_clear()


def asked_model():
    download(Model(path="org/model", revision=COMMIT))


def asked_rows():
    section = Hub(source="hub", path="org/rows", revision=COMMIT, split="train", text="text", seq_len=256)
    list(read_rows("rows", section, RowFiles((), "none")))


def asked_task():
    prepare(task("gsm8k"), None)


@pytest.mark.parametrize(
    ("ask", "error"), [(asked_model, ModelError), (asked_rows, DataError), (asked_task, (DataError, TaskError))]
)
def test_without_a_network_the_hub_is_one_message_at_once(no_name_server, caplog, ask, error):
    with pytest.raises(error, match="no network: huggingface.co is not known here"):
        ask()
    assert not caplog.records
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_what_fails_for_another_reason_is_told_as_it_is(no_name_server):
    with pytest.raises(FileNotFoundError, match="^a local file$"), reading_hub():
        raise FileNotFoundError("a local file")


@pytest.mark.parametrize("is_proxied", [True, False])
def test_where_the_hub_or_a_proxy_is_known_nothing_is_offline(no_name_server, monkeypatch, is_proxied):
    if is_proxied:
        monkeypatch.setenv("https_proxy", "http://proxy:3128")
    else:
        monkeypatch.setattr("socket.getaddrinfo", lambda *arguments: [])
    with reading_hub():
        assert not constants.HF_HUB_OFFLINE
        assert logging.getLogger("huggingface_hub").level == logging.ERROR
