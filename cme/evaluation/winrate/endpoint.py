"""A judge behind an OpenAI-compatible endpoint: a hosted model, or vLLM, llama.cpp, Ollama and others.

The `openai` client makes the requests, and repeats those that fail in passing.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import openai

from cme.errors import CMEError
from cme.evaluation.winrate.judges import Reply, token_count
from cme.evaluation.winrate.options import Options

DEFAULT_OPTIONS: Mapping[str, Any] = {"temperature": 0, "max_tokens": 2048}
"""Sampling options of a request. A reasoning model spends tokens on thoughts that it does not show."""

MAX_BODY = 10_000_000
"""Bytes of an answer, decompressed."""

_CONNECT_SECONDS = 10.0
_SHORTEST_SECRET = 8  # characters; a shorter one is a placeholder, and could not be told from other text
_REMEDIES = {
    401: "the key is missing or wrong: put a valid one into the environment variable {key_env} (or user:password@ "
    "before the host in --judge)",
    402: "the account has no credit left",
    403: "the key in the environment variable {key_env} may not use this model",
    404: "check --judge (it usually ends with /v1) and --judge-model",
    405: "check --judge (it usually ends with /v1)",
}

# httpx or httpx2, depending on the version of openai
_http: Any = importlib.import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])


class EndpointJudge:
    """Sends the key in the environment, or the user and password in the URL; neither is written or shown."""

    def __init__(self, options: Options) -> None:
        """Raises CMEError if the key or the URL is none."""
        url, login = options.endpoint
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        if not _is_url(self.url):  # and may hold a password that was not seen as one
            raise CMEError(
                "--judge is no URL that can be asked: check its host and port; in a user's name and password, "
                "write @ : / ? # as %40 %3A %2F %3F %23"
            )
        self.name = str(options.judge_model)
        body = {**DEFAULT_OPTIONS, **dict(options.judge_option)}
        self._body = {name: value for name, value in body.items() if value is not None}
        self.identity = {"kind": "endpoint", "url": self.url, "model": self.name, "options": self._body}
        self._options = options
        self._key_env = options.judge_key_env or "OPENAI_API_KEY"
        self._authorization = _bearer(options, self._key_env) if login is None else _basic(login)
        sent = self._authorization.partition(" ")[2]
        self._secrets = _pattern_of(sent, login or "", (login or "").partition(":")[2])

    def ask(self, texts: Sequence[str], record: Callable[[int, Reply], None]) -> None:
        """`concurrency` calls at a time. An error, or an interruption, waits for the calls in flight: they are
        paid for, so their answers are recorded. Raises CMEError, besides, where an event loop runs."""
        if _in_event_loop():
            raise CMEError(
                "an event loop is running here, as it does in a notebook: say `await asyncio.to_thread(compare, "
                "options, judge)`, or run `cme eval winrate` in a terminal"
            )
        asyncio.run(self._ask_all(texts, record))

    async def _ask_all(self, texts: Sequence[str], record: Callable[[int, Reply], None]) -> None:
        waiting = list(enumerate(texts))[::-1]

        async def work() -> None:
            while waiting:
                index, text = waiting.pop()
                record(index, await self._ask(client, text))

        async with openai.AsyncOpenAI(
            api_key="sent by the HTTP client",
            base_url=self.url,
            max_retries=self._options.retries,
            http_client=_Client(self._options.timeout, self._authorization),
        ) as client:
            workers = [asyncio.create_task(work()) for _ in range(self._options.concurrency)]
            try:
                await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                waiting.clear()
                done, retrying = await asyncio.wait(workers, timeout=self._options.timeout)
                for worker in retrying:
                    worker.cancel()
                errors = [error for worker in done if (error := worker.exception()) is not None]
            if errors:
                raise errors[0]

    async def _ask(self, client: openai.AsyncOpenAI, text: str) -> Reply:
        start = time.monotonic()
        sendable = text.encode(errors="backslashreplace").decode()  # without lone surrogates
        try:
            raw = await client.chat.completions.with_raw_response.create(
                model=self.name, messages=[{"role": "user", "content": sendable}], extra_body=self._body
            )
            request, reply = raw.http_request, self._read(raw.http_response)
        except openai.APIStatusError as error:
            request, reply = error.request, self._refusal(error)
        except openai.APIConnectionError as error:
            request, reply = error.request, _failed(f"no answer from {self.url}: {self._redacted(_cause(error))}")
        attempts = 1 + int(request.headers["x-stainless-retry-count"])
        return replace(reply, seconds=round(time.monotonic() - start, 3), attempts=attempts)

    def _read(self, response: Any) -> Reply:
        if len(response.content) > MAX_BODY:
            return _failed(f"{self.url} answered with more than {MAX_BODY / 1e6:g} MB")
        try:
            return self._completion(json.loads(response.content))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return _failed(f"{self.url} did not answer as OpenAI's API does: {self._excerpt(response.text)!r}")

    def _completion(self, body: Any) -> Reply:
        choice = body["choices"][0]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
        if not isinstance(text, str):
            told = self._excerpt(str(reason))
            return Reply(failure="refused", error=f"the judge wrote no text (finish_reason: {told})")
        usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
        return Reply(
            answer=self._redacted(text),
            cut_off=reason == "length",
            prompt_tokens=token_count(usage.get("prompt_tokens")),
            completion_tokens=token_count(usage.get("completion_tokens")),
        )

    def _refusal(self, error: openai.APIStatusError) -> Reply:
        """Raises CMEError where the next call would be refused too."""
        status = error.status_code
        message = error.body.get("message") if isinstance(error.body, dict) else None
        told = self._excerpt(error.response.text) if message is None else self._excerpt(str(message), 1000)
        reason = f"{self.url} answered HTTP {status}: {told.strip()}"
        if status in _REMEDIES:
            raise CMEError(f"{reason}\n{_REMEDIES[status].format(key_env=self._key_env)}") from None
        if 300 <= status < 400:
            target = self._redacted(error.response.headers.get("Location", ""))
            raise CMEError(f"{reason}\nit points to {target!r}: give that to --judge") from None
        passing = status in (408, 409, 429) or status >= 500
        return Reply(failure="unreachable" if passing else "refused", error=reason)

    def _excerpt(self, text: str, length: int = 200) -> str:
        return self._redacted(text.replace("\0", ""))[:length]

    def _redacted(self, text: str) -> str:
        """A server may answer with what it was sent, and answers are kept and shown."""
        return self._secrets.sub("[key]", text)


class _Client(openai.DefaultAsyncHttpxClient):
    """Sends `authorization`, unless it is empty, and follows no redirect. A whole answer has `seconds`, and
    MAX_BODY bytes, however slowly or endlessly a server doles it out."""

    def __init__(self, seconds: float, authorization: str) -> None:
        timeout = openai.Timeout(None, connect=min(_CONNECT_SECONDS, seconds))
        super().__init__(follow_redirects=False, timeout=timeout)
        self._seconds, self._authorization = seconds, authorization

    async def send(self, request: Any, **how: Any) -> Any:
        request.headers["Authorization"] = self._authorization
        if not self._authorization:
            del request.headers["Authorization"]
        body = bytearray()
        try:
            async with asyncio.timeout(self._seconds):
                response = await super().send(request, **{**how, "stream": True})
                try:
                    async for part in response.aiter_bytes():
                        body += part
                        if len(body) > MAX_BODY:
                            break
                finally:
                    await response.aclose()
        except TimeoutError:
            raise _http.ReadTimeout("timed out", request=request) from None
        decoded = ("content-encoding", "content-length", "transfer-encoding")
        headers = {name: value for name, value in response.headers.items() if name not in decoded}
        return _http.Response(
            response.status_code, headers=headers, content=bytes(body[: MAX_BODY + 1]), request=request
        )


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _bearer(options: Options, key_env: str) -> str:
    """Empty for servers that want no key."""
    key = os.environ.get(key_env, "").strip()
    if not key and options.judge_key_env is not None:
        raise CMEError(f"the environment variable {key_env} is not set: put the judge's key into it")
    if not (key.isascii() and key.isprintable()):
        raise CMEError(
            f"the key in the environment variable {key_env} has a line break or another character that no key "
            "has: put the key there, and nothing else"
        )
    return f"Bearer {key}" if key else ""


def _basic(login: str) -> str:
    return f"Basic {base64.b64encode(login.encode()).decode()}"


def _is_url(text: str) -> bool:
    try:
        return bool(urlsplit(text).hostname) and urlsplit(text).port != 0
    except ValueError:
        return False


def _pattern_of(*secrets: str) -> re.Pattern[str]:
    """Matches each, as it is or with characters escaped as JSON can escape them."""
    patterns = [
        "".join(rf"(?:\\*{re.escape(character)}|\\+u(?i:{ord(character):04x}))" for character in secret)
        for secret in secrets
        if len(secret) >= _SHORTEST_SECRET
    ]
    return re.compile("|".join(patterns) or "(?!)")


def _failed(error: str) -> Reply:
    return Reply(failure="unreachable", error=error)


def _cause(error: BaseException) -> str:
    if isinstance(error, openai.APITimeoutError):
        return "timed out"
    while (deeper := error.__cause__ or error.__context__) is not None and str(deeper):
        error = deeper
    return str(error)
