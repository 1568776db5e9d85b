"""Reading the hub: retries of its libraries are no news, and where its name is not known there are none. No torch."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from collections.abc import Iterator
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

from harness.errors import HarnessError

_LOGGERS = ("huggingface_hub", "datasets")


@contextlib.contextmanager
def reading_hub() -> Iterator[None]:
    """Within, the hub's libraries log errors alone; where no name server knows the hub they are offline, and read their caches.

    Raises:
        OSError: there is no network, and what was asked for is in no cache. An error of ours stays of its kind, and says so too.
    """
    from huggingface_hub import constants

    unknown = None if constants.HF_HUB_OFFLINE else _unknown_host(constants.ENDPOINT)
    with _quiet(), offline() if unknown else contextlib.nullcontext():
        try:
            yield
        except Exception as error:
            if unknown is None or not any("offline" in str(each).lower() for each in _causes(error)):
                raise
            reason = f"no network: {unknown} is not known here"
            if isinstance(error, HarnessError):  # of a task that reads its rows by itself
                raise type(error)(f"{error}; {reason}") from error
            raise OSError(reason) from error


@cache
def _unknown_host(endpoint: str) -> str | None:
    """The host of the hub where no name server knows it; None where one does, or a proxy asks in our place."""
    host = urlsplit(endpoint).hostname
    if host is None or getproxies().keys() & {"https", "http", "all"}:
        return None
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return host
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Within, what HF_HUB_OFFLINE=1 does, which the libraries read once, when they are imported."""
    from huggingface_hub import constants

    places = [constants, *([sys.modules["datasets.config"]] if "datasets.config" in sys.modules else [])]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
