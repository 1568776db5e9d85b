"""What a suite says of servers: how the harness starts one, or where one is; and what contradicts what. No torch here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field

from harness.section import PositiveFloat, Section

if TYPE_CHECKING:
    from harness.schema import Engine, File, Judge, Variant

OF_THE_CLIENT = ("concurrency", "timeout_s", "retries")
"""engine.args that say how a server is asked, and change no answer."""
OF_ANY_SERVER = (*OF_THE_CLIENT, "max_model_len")
PLACEHOLDERS = ("{folder}", "{host}", "{port}", "{name}")

_SECONDS: tuple[Callable[[Any], bool], str] = (
    lambda value: type(value) in (int, float) and value > 0,
    "a positive number, in seconds",
)
CLIENT_ARGS = {
    "concurrency": (lambda value: type(value) is int and value > 0, "a positive integer"),
    "timeout_s": _SECONDS,
    "retries": (lambda value: type(value) is int and value >= 0, "a whole number, 0 or more"),
}
"""The arguments of the server engine beside those of vLLM: what is allowed, as a test and in words."""


class Launch(Section):
    """A server that the harness starts for each checkpoint, and ends.

    command: a program with its arguments, in which PLACEHOLDERS are filled in; left out, `vllm serve`.
    startup_s: how long it may take until it answers.
    """

    command: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    startup_s: PositiveFloat = 1800.0


class Endpoint(Section):
    """A server that is there: the base of its completions API, the name of the model, the variable that holds its key."""

    url: str
    model: Annotated[str, Field(min_length=1)]
    api_key_env: str | None = None


def server_mistakes(file: File) -> Iterator[tuple[str, str]]:
    """Pairs of a key and what is wrong with it, about launch and endpoints. Neither keys nor passwords are repeated."""
    engine, variants = file.engine, file.variant
    given = [variant for variant in variants if variant.endpoint is not None]
    yield from _engine_mistakes(engine, has_endpoint=bool(given), whose="the variants name endpoints")
    for index, variant in enumerate(variants):
        where = f"variant[{index}].endpoint"
        if variant.endpoint is None:
            if given and engine.kind == "server":
                yield where, f'missing; variant "{given[0].name}" has one: give one to every variant, or to none'
            continue
        if engine.kind != "server":
            yield where, f'has no effect with engine.kind = "{engine.kind}"; remove it, or use "server"'
        yield from ((f"{where}{key}", message) for key, message in _endpoint_mistakes(variant.endpoint))
        yield from ((where, message) for message in _variant_mistakes(variant, given, file))


def judge_mistakes(judge: Judge) -> Iterator[tuple[str, str]]:
    """The same of [judge]; keys without it."""
    whose = "the judge has an endpoint"
    found = _engine_mistakes(judge.engine, has_endpoint=judge.endpoint is not None, whose=whose)
    yield from found
    if judge.endpoint is None:
        return
    if judge.engine.kind != "server":
        yield "endpoint", f'has no effect with judge.engine.kind = "{judge.engine.kind}"; remove it, or use "server"'
    yield from ((f"endpoint{key}", message) for key, message in _endpoint_mistakes(judge.endpoint))


def _engine_mistakes(engine: Engine, *, has_endpoint: bool, whose: str) -> Iterator[tuple[str, str]]:
    if engine.kind != "server":
        if engine.launch is not None:
            yield "engine.launch", f'has no effect with kind = "{engine.kind}"; remove it, or use "server"'
        return
    command = engine.launch.command if engine.launch is not None else None
    if has_endpoint and engine.launch is not None:
        yield "engine.launch", f"has no effect: {whose}; remove it, or them"
    for needed in ("{folder}", "{port}") if command is not None else ():
        if not any(needed in part for part in command or ()):
            yield "engine.launch.command", f"{needed} is missing; placeholders: {', '.join(PLACEHOLDERS)}"
    if has_endpoint or command is not None:
        why = "the server is not started by the harness" if has_endpoint else "the command is your own"
        for key in engine.args:
            if key not in OF_ANY_SERVER:
                yield f"engine.args.{key}", f"has no effect: {why}; allowed: {', '.join(OF_ANY_SERVER)}"


def _endpoint_mistakes(endpoint: Endpoint) -> Iterator[tuple[str, str]]:
    yield from ((".url", message) for message in url_mistakes(endpoint.url))
    if endpoint.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", endpoint.api_key_env):
        yield (
            ".api_key_env",
            "not a variable's name (capitals, digits, _); never the key itself: name the variable that holds it",
        )


def _variant_mistakes(variant: Variant, given: list[Variant], file: File) -> Iterator[str]:
    same = next(other for other in given if _place(other) == _place(variant) and not _is_null_of(variant, other))
    if same is not variant:
        yield f'the same server and model as of variant "{same.name}"; two variants are never answered by one model'
    if variant.seeds is not None and len(variant.seeds) > 1:
        yield f"serves one checkpoint, but seeds make {len(variant.seeds)} of them; give each a variant of its own"
    selects = variant.training.get("select", file.training.select if file.training is not None else None)
    if variant.method in ("qat", "qad") and selects == "best_of_k":
        yield 'serves one checkpoint, but select = "best_of_k" asks several; use "last" or "best_val"'


def _is_null_of(one: Variant, other: Variant) -> bool:
    """Whether two variants are one checkpoint, asked with other seeds."""
    settings = [variant.model_dump(exclude={"name", "endpoint", "sampling_seed"}) for variant in (one, other)]
    return settings[0] == settings[1] and one.sampling_seed != other.sampling_seed


def _place(variant: Variant) -> tuple[str, str]:
    assert variant.endpoint is not None
    return variant.endpoint.url.rstrip("/"), variant.endpoint.model


def url_mistakes(url: str) -> Iterator[str]:
    """What is wrong with the base URL of a server; what could be a password in it is not repeated."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, is_address = urlsplit(""), False
    if "@" in url or "?" in url or "#" in url:
        yield "a user, password, query or fragment in it; give the plain address, and a key through api_key_env"
    elif not is_address:
        yield f"found {url!r}; allowed: an address such as http://localhost:8000/v1"


def kinds_of(section: dict[str, Any]) -> tuple[str, ...]:
    """The kinds of numerics, beside its own, that decide a stage with this `engine_identity`: a vLLM of ours, the server engine."""
    kind = section.get("kind")
    is_our_vllm = kind == "vllm" or (kind == "server" and not section["launch"] and "endpoint" not in section)
    return (*(("server",) if kind == "server" else ()), *(("vllm",) if is_our_vllm else ()))


def engine_identity(engine: Engine, endpoint: Endpoint | None, *, is_quantized: bool) -> dict[str, Any]:
    """What of [engine] can change what it answers for a variant: not how a server is asked, nor where it is, nor its key.

    A BF16 model is computed in BF16 whatever kernels are asked for.
    """
    section = engine.model_dump(exclude_none=True, exclude=set() if is_quantized else {"kernels"})
    if engine.kind == "server":
        section["args"] = {key: value for key, value in engine.args.items() if key not in OF_THE_CLIENT}
        section["launch"] = list((engine.launch and engine.launch.command) or ())
        if endpoint is not None:
            section["endpoint"] = endpoint.model
    return section
