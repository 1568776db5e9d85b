"""A client of the completions protocol (OpenAI's, with vLLM's extensions): one prompt of token ids a request.

What can pass by itself (no connection, a time-out, status 408, 429 or 5xx, an answer that is none) is asked again, later and
later; what cannot is an EngineError with the server's words. No message holds a key, a prompt or an image, whatever the server says.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from harness.errors import EngineError

T = TypeVar("T")

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
CONNECT_S = 10.0
LOOK_S = 30.0
"""How long a question about the server itself may take."""
_IDLE_S = 2.0
"""Below the five seconds after which common servers close an idle connection, perhaps under a request."""
_WORDS = 300
_QUOTED = 24
"""So many characters in a row that are the prompt's are taken for a quotation of it."""
_IMAGES = re.compile(r"(?:data:[\w/.+-]*;base64,)?[A-Za-z0-9+/=]{64,}|data:[\w/.+-]*;base64,\S*")
_NUMBERS = re.compile(r"(?:\d+\s*,\s*){4,}\d*")


class Unanswered(Exception):
    """A request without a usable answer. never_reached: no connection came about. wait_s: what the server asks to wait."""

    def __init__(self, reason: str, *, never_reached: bool = False, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.never_reached, self.wait_s = never_reached, wait_s


class Completions:
    """One server. Its coroutines belong to one event loop.

    Args:
        url: the base of the API, such as http://localhost:8000/v1.
        key: sent as a bearer token, and cut out of every message.
        timeout_s: of one attempt, from the question to the end of the answer.
        retries: attempts after the first.
        sleep: what waits between attempts.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float,
        retries: int,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self.url, self.timeout_s, self.retries = url.rstrip("/"), timeout_s, retries
        self._key, self._sleep = key, sleep
        parts = urlsplit(url)
        self._client = httpx.AsyncClient(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_S),
            trust_env=parts.hostname not in ("localhost", "127.0.0.1", "::1"),  # proxies are for elsewhere
            verify=parts.scheme == "https",  # reading certificates takes time that plain http does not need
        )

    async def post(
        self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any], float], T], prompt: Callable[[], str]
    ) -> T:
        """What `read` makes of the reply and the seconds it took; it may raise as this does. prompt: the text that no message may quote.

        Raises:
            Unanswered: no attempt gave an answer.  EngineError: the server refuses the request.
        """

        async def ask() -> T:
            began = time.perf_counter()
            raw = await self._once("POST", f"{self.url}/{path}", body, prompt)
            try:
                return read(raw, time.perf_counter() - began)
            except EngineError as error:
                raise EngineError(self.redacted(str(error))) from None
            except Unanswered as failure:
                raise Unanswered(self.redacted(str(failure))) from None

        return await self._retried(ask, self.retries)

    async def get(self, path: str, *, retries: int | None = None) -> dict[str, Any] | list[Any] | None:
        """The JSON at a path of the API ("models"), or from the root of the server ("/version"); None where there is none,
        or, outside the API, a page in its place.

        Raises as `post` does.
        """
        url = f"{self.url.removesuffix('/v1')}{path}" if path.startswith("/") else f"{self.url}/{path}"
        return await self._retried(lambda: self._once("GET", url, None, str), self.retries if retries is None else retries)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def redacted(self, words: str) -> str:
        """`words` without the key."""
        return words.replace(self._key, "[key]") if self._key else words

    def shown(self, words: str, prompt: Callable[[], str] = str) -> str:
        """Words of a server as they may be shown: on one line, short, without the key, images, numbers in a row and quoted prompt."""
        words = _NUMBERS.sub("[numbers]", _IMAGES.sub("[image]", " ".join(self.redacted(words).split())))
        words = _without(words[: 4 * _WORDS], " ".join(prompt().split()))
        return words if len(words) <= _WORDS else f"{words[:_WORDS]} ..."

    async def _retried(self, ask: Callable[[], Awaitable[T]], retries: int) -> T:
        for attempt in range(retries):
            try:
                return await ask()
            except Unanswered as failure:
                await self._sleep(self._wait(attempt, failure.wait_s))
        return await ask()

    async def _once(self, method: str, url: str, body: dict[str, Any] | None, prompt: Callable[[], str]) -> Any:
        limit_s = self.timeout_s if method == "POST" else min(self.timeout_s, LOOK_S)
        try:
            async with asyncio.timeout(limit_s):
                response = await self._client.request(method, url, json=body)
        except TimeoutError:
            raise Unanswered(f"no answer within {limit_s:g} s") from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unanswered(f"no connection: {self.shown(str(error)) or 'timed out'}", never_reached=True) from None
        except httpx.RequestError as error:
            raise Unanswered(f"the connection was cut: {self.shown(str(error)) or type(error).__name__}") from None
        status = response.status_code
        words = "" if status == 200 else self.shown(_message(response), prompt)
        if status in (408, 429) or status >= 500:
            raise Unanswered(f"status {status}: {words}", wait_s=_asked_wait(response))
        if method == "GET" and status in (404, 405):
            return None
        if status != 200:
            raise EngineError(f"{url}: the server refuses with status {status}: {words or 'no words'}{_advice(status)}")
        try:
            found = response.json()
        except ValueError:
            if not url.startswith(f"{self.url}/"):
                return None  # a page, as some servers show at any path outside the API
            raise Unanswered(f"the answer is not JSON: {self.shown(response.text, prompt)[:60]!r}") from None
        if method == "POST" and (not isinstance(found, dict) or found.get("error")):
            raise Unanswered(f"an error in place of an answer: {self.shown(_message(response), prompt) or 'no words'}")
        return found

    def _wait(self, attempt: int, asked_s: float | None) -> float:
        """Seconds until the next attempt: what the server asked for, or twice as long each time; never all at once."""
        if asked_s is not None:
            return min(asked_s, self.timeout_s) + random.random()
        return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt) * (0.5 + random.random())


def _message(response: httpx.Response) -> str:
    """The words in an error's body: `message` where it is in the common form."""
    try:
        found = response.json()
    except ValueError:
        return response.text
    inner = found.get("error", found) if isinstance(found, dict) else found
    said = inner.get("message", inner) if isinstance(inner, dict) else inner
    return said if isinstance(said, str) else response.text


def _asked_wait(response: httpx.Response) -> float | None:
    """Seconds that Retry-After asks for, given in seconds or as a date; None without a readable one."""
    given = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(given))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    except ValueError:
        return None


def _advice(status: int) -> str:
    known = {
        401: "; set the variable that endpoint.api_key_env names to a valid key",
        403: "; set the variable that endpoint.api_key_env names to a key that may use the model",
        404: "; endpoint.url is the base of the API, which commonly ends in /v1, and endpoint.model a name that it serves",
    }
    return known.get(status, "")


def _without(words: str, prompt: str) -> str:
    """`words` with quotations of the prompt cut out."""
    kept, start = "", 0
    while start < len(words):
        end = start + _QUOTED
        if end <= len(words) and words[start:end] in prompt:
            while end < len(words) and words[start : end + 1] in prompt:
                end += 1
            kept, start = kept + "[prompt]", end
        else:
            kept, start = kept + words[start], start + 1
    return kept
