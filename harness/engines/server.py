"""A server that speaks the completions protocol behind the engine protocol: one the harness starts, or one that is there.

Prompts travel as the token ids that the harness rendered, those with images as chats (`chat`), with complete sampling
parameters, so that no default of a server or of a checkpoint's generation_config.json acts; where a reply shows that something else was asked or done, it is no answer. A
server that the harness starts from the checkpoint folder proves its kernels (`kernel_report`), where its command can. Of one
that is there neither weights nor kernels can be proven: they are recorded as unverified, with a fingerprint that is held
against every later start.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from harness.engines import RENDERING_UNVERIFIED, Failure, Outcome, Request, Sampling, chat, kernel_report
from harness.engines.asked import asked_kernels, computed_with, require_kernels
from harness.engines.completions import Completions, Unanswered
from harness.engines.exchange import Reply, answer_of, body_of, likelihood_of, read_reply
from harness.engines.fingerprint import PROMPTS, TOP, Fingerprint, Reading
from harness.engines.launch import Launched, require_plugin, server_environment, vllm_serve, wait_between_looks
from harness.engines.vllm import needs_of, require_servable, takes_images, vllm_options
from harness.errors import EngineError
from harness.models import text_config_with_defaults
from harness.numerics import versions
from harness.provenance import VLLM_PACKAGES, package_versions, vllm_device_kind
from harness.schema_server import OF_THE_CLIENT, Endpoint, Launch

T = TypeVar("T")

VERSION = 1
UNVERIFIED, KERNELS_UNVERIFIED, NO_FINGERPRINT = "unverified", "kernels unverified", "no fingerprint"
"""What a row's flags say: neither weights nor kernels are proven; kernels are not; the server gives nothing to know it by."""
DEFAULT_CONCURRENCY, DEFAULT_TIMEOUT_S, DEFAULT_RETRIES = 32, 3600.0, 5
HOPELESS = 8
"""So many first requests that all fail, or requests in a row that find no server, end a run."""
_LOOKS = 2
"""Attempts after the first to learn what a server says of itself."""


class ServerEngine:
    """Asks a server. Close it when done; a server that was started here ends with it.

    Args:
        weights: fingerprint of the checkpoint in `folder`; of an endpoint, the declared one.
        kernels, args: as in a suite's [engine].
        launch: how to start a server; None for vLLM's own. Not looked at where an `endpoint` is given.
        records: folder for the fingerprints of endpoints, beside the journals.
        trust_remote_code: as of the vllm engine, of a server of vLLM that is started here.
        sleep: what waits between attempts.
    Raises:
        EngineError: no server, no such model, other kernels than asked for, or another fingerprint than at first contact.
        StoreError: the fingerprint's record cannot be read or written.
    """

    answers_depend_on_batch = False
    backend: str | None = None

    def __init__(
        self,
        folder: Path,
        tokenizer: Any,
        *,
        eos_ids: set[int],
        weights: str,
        kernels: str | None,
        args: dict[str, Any],
        records: Path | None = None,
        launch: Launch | None = None,
        endpoint: Endpoint | None = None,
        trust_remote_code: bool = False,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self.folder, self.tokenizer, self.eos_ids = folder, tokenizer, frozenset(eos_ids)
        self._trusts = trust_remote_code
        self.concurrency = int(args.get("concurrency", DEFAULT_CONCURRENCY))
        self._connected = functools.partial(
            Completions,
            timeout_s=float(args.get("timeout_s", DEFAULT_TIMEOUT_S)),
            retries=int(args.get("retries", DEFAULT_RETRIES)),
            sleep=sleep,
        )
        self._runner = asyncio.Runner()
        self._client: Completions | None = None
        self._launched: Launched | None = None
        self._tells_tokens = False
        given = {key: value for key, value in args.items() if key not in OF_THE_CLIENT}
        try:
            if endpoint is None:
                self._launch(launch or Launch(), kernels, given)
            else:
                self._connect(endpoint, weights, kernels, given, records)
        except Unanswered as failure:
            url = self.client.url
            self.close()
            raise EngineError(
                f"{url}: the server gives no answer ({failure}); start it, or correct the address; nothing was asked of it"
            ) from None
        except BaseException:
            self.close()
            raise

    @property
    def client(self) -> Completions:
        assert self._client is not None
        return self._client

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        return [list(range(len(requests)))] if requests else []

    def answer(self, batch: Sequence[Request]) -> Iterator[tuple[int, Outcome]]:
        """As `Engine.answer`; at most `concurrency` requests are under way, and an order that shares prefixes is kept.

        Raises:
            EngineError: the server refuses a request, fails the first HOPELESS, or cannot be reached HOPELESS times in a row.
        """
        has_answered, failed, unreached = False, 0, 0
        with contextlib.closing(self._finished(batch)) as finished:
            for place, outcome in finished:
                if not isinstance(outcome, Unanswered):
                    has_answered, unreached = True, 0
                    yield place, outcome
                    continue
                failed, unreached = failed + 1, unreached + 1 if outcome.never_reached else 0
                yield place, Failure(str(outcome))
                if (failed >= HOPELESS and not has_answered) or unreached >= HOPELESS:
                    raise EngineError(self._hopeless(str(outcome), has_answered))

    def _finished(self, batch: Sequence[Request]) -> Generator[tuple[int, Outcome | Unanswered], None, None]:
        """What came of each request, as it finishes. Nothing is under way any more when this ends, however it ends."""
        waiting = iter(range(len(batch)))
        finished: asyncio.Queue[tuple[int, Outcome | Unanswered] | Exception] = asyncio.Queue()

        async def work() -> None:
            try:
                for place in waiting:
                    try:
                        finished.put_nowait((place, await self._ask(batch[place])))
                    except Unanswered as failure:
                        finished.put_nowait((place, failure))
            except Exception as error:  # raised below
                finished.put_nowait(error)

        async def start() -> list[asyncio.Task[None]]:
            return [asyncio.create_task(work()) for _ in range(min(self.concurrency, len(batch)))]

        workers = self._run(start())
        try:
            for _ in batch:
                found = self._run(finished.get())
                if isinstance(found, Exception):
                    raise found
                yield found
        finally:
            if self._client is not None:
                self._run(_cancel(workers))

    def close(self) -> None:
        """Close the connections and end the server that was started here; a second call does nothing."""
        if self._client is not None:
            self._run(self._client.close())
            self._client = None
        self._runner.close()
        if self._launched is not None:
            self._launched.close()
            self._launched = None

    # how it begins

    def _launch(self, launch: Launch, kernels: str | None, args: dict[str, Any]) -> None:
        """Start a server from the folder and learn what it serves."""
        is_vllm = launch.command is None
        asked, computed = asked_kernels(self.folder, kernels=kernels, args=args), computed_with(self.folder, kernels)
        about: dict[str, Any] = {"command": list(launch.command or ("vllm serve",)), "asked_kernels": computed}
        if is_vllm:
            require_servable(self.folder, kernels=kernels, args=args, trust_remote_code=self._trusts)
            require_plugin(computed, **needs_of(self.folder))
            options = vllm_options(self.folder, kernels=computed, args=args, trust_remote_code=self._trusts)
            options |= {
                key: args[key] for key in ("data_parallel_size",) if key in args
            }  # the vllm engine has processes of its own
            about |= {"options": options, "numerics_vllm": versions()["vllm"], "device": vllm_device_kind()}
            about |= {"engine_packages": package_versions(VLLM_PACKAGES)}
            args = options
        command = launch.command or tuple(vllm_serve(args))
        environment = server_environment(computed, **needs_of(self.folder))
        self._launched = Launched(command, self.folder, environment=environment, startup_s=launch.startup_s)
        self._client = self._connected(self._launched.url)
        listed = self._wait_until_ready(self._launched)
        is_named = any("{name}" in part for part in command)
        if not is_named and len(listed) > 1:
            raise EngineError(
                f"engine.launch.command: the server has {len(listed)} models; put {{name}} in, as the name to serve"
            )
        name = self._launched.name if is_named else next(iter(listed))
        self._introduce(name, listed, args, about)
        found = self._reported_kernels()
        if found is None and is_vllm:
            raise EngineError(f"{self.folder}: the server did not say which kernels it loaded; nothing was asked of it")
        if found is not None:
            require_kernels(asked, found, self.folder)
        self.kernels = found or {part: f"unverified {wanted}" for part, wanted in asked.items()}
        self.flags: tuple[str, ...] = () if found else (KERNELS_UNVERIFIED,)
        self._run(self._first_tokens(PROMPTS[:1]))
        self._look_at_images()

    def _connect(
        self, endpoint: Endpoint, weights: str, kernels: str | None, args: dict[str, Any], records: Path | None
    ) -> None:
        """Learn what a given server serves, and hold it against first contact."""
        self._client = self._connected(endpoint.url, key=key_of(endpoint))
        listed = _models(self._run(self.client.get("models", retries=_LOOKS)))
        about = {"endpoint": True, "declared_checkpoint": weights}
        self._introduce(endpoint.model, listed, args, about)
        self.kernels = {"linear": f"unverified {kernels or ''}".strip(), "kv_cache": "unverified"}
        self.flags = (UNVERIFIED,)
        assert records is not None
        fingerprint = Fingerprint(records, weights, endpoint.model)
        said = listed.get(endpoint.model)
        reading = self._run(self._first_tokens(PROMPTS))
        if all(reading):
            fingerprint.check(
                reading,
                lambda: self._run(self._first_tokens(PROMPTS)),
                where=self.client.url,
                about={"url": self.client.url, "models": said, "kernels": kernels, "server": self.protocol["server"]},
            )
        elif fingerprint.path.exists():
            raise EngineError(
                f"{self.client.url}: model {endpoint.model} gave log probabilities at first contact and gives none now, so it cannot be "
                f"told from another; serve it as before, or move {fingerprint.path} away"
            )
        else:
            self.flags += (NO_FINGERPRINT,)
        self._look_at_images()

    def _wait_until_ready(self, launched: Launched) -> dict[str, dict[str, Any]]:
        began, waited = time.monotonic(), 0.0
        while True:
            launched.require_running(waited)
            try:
                listed = _models(self._run(self.client.get("models", retries=0)))
            except Unanswered:
                listed = {}
            if listed:
                return listed
            waited = wait_between_looks(began)

    def _introduce(self, name: str, listed: dict[str, dict[str, Any]], args: dict[str, Any], about: dict[str, Any]) -> None:
        """Set what follows from the model's name and from what the server says of it."""
        if listed and name not in listed:
            raise EngineError(f"{self.client.url}: serves no model {name!r}; it serves: {self.client.shown(', '.join(listed))}")
        self.model, self._is_vllm = name, listed.get(name, {}).get("owned_by") == "vllm"
        served = listed.get(name, {}).get("max_model_len")
        lengths = [n for n in (served, args.get("max_model_len")) if isinstance(n, int)] or [_configured_length(self.folder)]
        self.context_length = min(lengths) - 1  # a likelihood request generates one token, which is dropped
        version = self._said("/version")
        self.protocol: dict[str, Any] = {
            "engine": "server",
            "version": VERSION,
            **about,
            "model": name if "endpoint" in about else None,
            "server": version if isinstance(version, dict) else None,
            "rendered_by": "harness",
        }

    def _said(self, path: str) -> Any:
        """What the server says at a path that not every server has, None where it has none or refuses it; Unanswered as elsewhere.

        What it says is part of the journal's name, so a failure that passes is never taken for "says nothing".
        """
        try:
            return self._run(self.client.get(path, retries=_LOOKS))
        except EngineError:
            return None

    def _reported_kernels(self) -> dict[str, str] | None:
        """The kernels that the server says its workers loaded; None where it does not say."""
        found = self._said(kernel_report.PATH)
        if not isinstance(found, list) or not found or not all(isinstance(one, dict) and "linear" in one for one in found):
            return None
        if any(other != found[0] for other in found):
            raise EngineError(f"{self.folder}: the workers of one model compute with different kernels: {found}")
        return dict(found[0])

    async def _first_tokens(self, prompts: Sequence[str]) -> Reading:
        """Log probabilities of the likeliest first tokens after each prompt, asked one by one; empty where none are given.

        Also sees whether the server returns token ids.
        """
        reading = []
        for prompt in prompts:
            request = Request(token_ids=tuple(self.tokenizer(prompt)["input_ids"]), sampling=Sampling(max_tokens=1, until=()))
            more = {"logprobs": TOP, "return_tokens_as_token_ids": True}
            choice = await self._exchange(request, more, lambda reply, seconds: reply.choices[0])
            self.protocol["token_ids"] = "retokenized" if choice.token_ids is None else "returned"
            top = choice.logprobs.top_logprobs if choice.logprobs else None
            reading.append((top[0] or {}) if top else {})
        return reading

    # how it is asked

    async def _ask(self, request: Request) -> Outcome:
        """The outcome of one request; Unanswered once it was asked often enough."""

        def read(reply: Reply, seconds: float) -> Outcome:
            if request.sampling is None:
                return likelihood_of(reply, request, where=self.client.url, seconds=seconds)
            return answer_of(reply, request.sampling, tokenizer=self.tokenizer, eos_ids=self.eos_ids, seconds=seconds)

        return await self._exchange(request, {}, read)

    async def _exchange(self, request: Request, more: dict[str, Any], read: Callable[[Reply, float], T]) -> T:
        """What `read` makes of the reply, and of the seconds that it took when it came. With images it is a chat that is asked."""
        has_images, where = bool(request.images), self.client.url

        def read_raw(raw: dict[str, Any], seconds: float) -> T:
            if has_images:
                return read(
                    chat.read_chat(raw, request, model=self.model, where=where, tells_tokens=self._tells_tokens), seconds
                )
            return read(read_reply(raw, request, model=self.model, where=where), seconds)

        def prompt() -> str:
            return str(self.tokenizer.decode(list(request.token_ids)))

        path, form = (chat.PATH, chat.chat_body_of) if has_images else ("completions", body_of)
        body = form(request, model=self.model, eos_ids=self.eos_ids, is_vllm=self._is_vllm) | more
        return await self.client.post(path, body, read_raw, prompt)

    def _look_at_images(self) -> None:
        """Learn, of an image-text model, whether the server says what it makes of a chat with images."""
        if takes_images(self.folder):
            asked = chat.image_prompts(self.client, model=self.model, eos_ids=self.eos_ids, is_vllm=self._is_vllm)
            self.protocol |= {"images_rendered_by": "server", "image_prompts": self._run(asked)}
            self._tells_tokens = self.protocol["image_prompts"] == "returned"
            self.flags += () if self._tells_tokens else (RENDERING_UNVERIFIED,)

    def _hopeless(self, reason: str, has_answered: bool) -> str:
        if self._launched is not None:
            self._launched.require_running()
        what = f"{HOPELESS} requests in a row found no server" if has_answered else f"the first {HOPELESS} requests all failed"
        return (
            f"{self.client.url}: {what}, the last one with: {reason}. What was answered is kept; see to the server, then run the "
            "same command again"
        )

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _models(reply: Any) -> dict[str, dict[str, Any]]:
    """What /models lists, by name."""
    entries = reply.get("data") if isinstance(reply, dict) else None
    return {str(one["id"]): one for one in entries or () if isinstance(one, dict) and "id" in one}


def key_of(endpoint: Endpoint) -> str | None:
    """The key that its variable holds; None where it needs none. EngineError for a variable that is not set."""
    if endpoint.api_key_env is None:
        return None
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key:
        raise EngineError(f"{endpoint.url}: its key is to be in the variable {endpoint.api_key_env}, which is not set; set it")
    if not key.isascii() or not key.isprintable():
        raise EngineError(f"{endpoint.url}: the variable {endpoint.api_key_env} holds characters that no key has; set it anew")
    return key


def _configured_length(folder: Path) -> int:
    length = text_config_with_defaults(json.loads((folder / "config.json").read_text())).get("max_position_embeddings")
    if length is None:
        raise EngineError(
            f"{folder}: neither its config.json nor the server says how long a context may be; set engine.args.max_model_len"
        )
    return int(length)
