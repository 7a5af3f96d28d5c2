"""A judge behind an OpenAI-compatible endpoint: a hosted model, or vLLM, llama.cpp, Ollama and others."""

from __future__ import annotations

import base64
import json
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from email.utils import mktime_tz, parsedate_tz
from functools import cached_property
from typing import Any

import requests
from requests.exceptions import InvalidURL

from cme.errors import CMEError
from cme.evaluation.winrate.cache import token_count
from cme.evaluation.winrate.judges import Reply
from cme.evaluation.winrate.transport import MAX_BODY, Answer, NoAnswer, new_session, post

DEFAULT_OPTIONS: Mapping[str, Any] = {"temperature": 0, "max_tokens": 2048}
"""Of a request. A reasoning model spends tokens on thoughts that it does not show."""

RETRY_AFTER_MAX = 300
"""Seconds; most of what a server's Retry-After can make a call wait."""

BACKOFF = 1.0
"""Seconds before the first retry, doubled for each one after it; as much again, at random, is added."""

_BACKOFF_MAX = 60
_SHORTEST_SECRET = 8
"""Characters. A shorter key is a placeholder, and could not be told from other text."""

_PASSING = (408, 409, 429, 500, 502, 503, 504, 529)
_REMEDIES = {
    401: "the key is missing or wrong: put a valid one into the environment variable {key_env} (or user:password@ "
    "before the host in --judge)",
    402: "the account has no credit left",
    403: "the key in the environment variable {key_env} may not use this model",
    404: "check --judge (it usually ends with /v1) and --judge-model",
    405: "check --judge (it usually ends with /v1)",
}


@dataclass(frozen=True)
class EndpointJudge:
    """Attributes:
    url: without /chat/completions, and without a user's name and password.
    key: sent as a bearer token; None for servers that want none.
    key_env: where the key comes from, for error messages.
    login: `user:password` for basic authentication, in place of a key.
    options: what a request has besides the model and the message.
    timeout: seconds for an attempt, to the last byte of the answer.
    retries: further attempts after an answer of 429 or 5xx, no connection, a lost one, or a timeout.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    key_env: str = "OPENAI_API_KEY"
    login: str | None = field(default=None, repr=False)
    options: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_OPTIONS))
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 5

    def __post_init__(self) -> None:
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise CMEError(
                f"the key in the environment variable {self.key_env} has a line break or another character that "
                "no key has: put the key there, and nothing else"
            )

    @property
    def name(self) -> str:
        return self.model

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "endpoint", "url": self.url, "model": self.model, "options": dict(self.options)}

    def ask(self, texts: Sequence[str], record: Callable[[int, Reply], None]) -> None:
        """`concurrency` calls at a time. An error, or an interruption, waits for the calls in flight: they are
        paid for, so their answers are recorded."""
        over = threading.Event()

        def call(index: int, text: str) -> None:
            if over.is_set():
                return
            try:
                record(index, self._ask(text, over))
            except BaseException:
                over.set()
                raise

        pool = ThreadPoolExecutor(self.concurrency)
        try:
            for done in as_completed([pool.submit(call, i, text) for i, text in enumerate(texts)]):
                done.result()
        finally:
            over.set()
            pool.shutdown(cancel_futures=True)

    def _ask(self, text: str, over: threading.Event) -> Reply:
        """Of as many attempts as it takes, but no further one once it is `over`."""
        start = time.monotonic()
        attempts = 0
        while True:
            reply, pause = self._attempt(text)
            attempts += 1
            if pause is None or attempts > self.retries or over.wait(max(pause, _backoff(attempts))):
                return replace(reply, seconds=time.monotonic() - start, attempts=attempts)

    def _attempt(self, text: str) -> tuple[Reply, float | None]:
        """The reply, and the least seconds to wait before another attempt; None if that wouldn't help."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], **self.options}
        try:
            answer = post(self._session, f"{self.url}/chat/completions", body, self._authorization, self.timeout)
        except InvalidURL:  # whose text may hold a password that was not seen as one
            raise CMEError(
                "--judge is no URL that can be asked: check its host and port; in a user's name and password, "
                "write @ : / ? # as %40 %3A %2F %3F %23"
            ) from None
        except NoAnswer as error:
            return _failed(f"no answer from {self.url}: {self._redacted(str(error))}"), 0.0
        if answer.status == 200:
            return self._reply(answer), None
        reason = f"{self.url} answered HTTP {answer.status}: {self._message(answer)}"
        if answer.status in _PASSING:
            return _failed(reason), _retry_after(answer.headers.get("Retry-After", ""))
        if answer.status in _REMEDIES:
            raise CMEError(f"{reason}\n{_REMEDIES[answer.status].format(key_env=self.key_env)}")
        if 300 <= answer.status < 400:
            target = self._redacted(answer.headers.get("Location", ""))
            raise CMEError(f"{reason}\nit points to {target!r}: give that to --judge")
        return Reply(None, "refused", reason), None

    def _reply(self, answer: Answer) -> Reply:
        if answer.too_long:
            return _failed(f"{self.url} answered with more than {MAX_BODY / 1e6:g} MB")
        try:
            return self._read(json.loads(answer.body))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return _failed(f"{self.url} did not answer as OpenAI's API does: {self._excerpt(answer)!r}")

    def _read(self, body: Any) -> Reply:
        choice = body["choices"][0]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
        if not isinstance(text, str):
            why = self._redacted(str(reason))[:200]
            return Reply(None, "refused", f"the judge wrote no text (finish_reason: {why})")
        usage = body.get("usage")
        prompt, completion = (
            token_count(usage.get(f"{kind}_tokens")) if isinstance(usage, dict) else None
            for kind in ("prompt", "completion")
        )
        return Reply(
            self._redacted(text), cut_off=reason == "length", prompt_tokens=prompt, completion_tokens=completion
        )

    def _message(self, answer: Answer) -> str:
        try:
            error = json.loads(answer.body)["error"]
            return self._redacted(str(error["message"] if isinstance(error, dict) else error))[:1000]
        except (ValueError, LookupError, TypeError, RecursionError):
            return self._excerpt(answer).strip()

    def _excerpt(self, answer: Answer) -> str:
        return self._redacted(answer.body.replace(b"\0", b"").decode(errors="replace"))[:200]

    def _redacted(self, text: str) -> str:
        """A server may answer with what it was sent, and answers are kept and shown."""
        return self._secret.sub("[key]", text)

    @cached_property
    def _secret(self) -> re.Pattern[str]:
        """The key, the login and its password, as they are or with characters escaped as JSON can escape them."""
        login = self.login or ""
        sent = (self._authorization or "").partition(" ")[2]
        found = (secret for secret in (sent, login, login.partition(":")[2]) if len(secret) >= _SHORTEST_SECRET)
        return re.compile("|".join("".join(map(_escapable, secret)) for secret in found) or "(?!)")

    @cached_property
    def _authorization(self) -> str | None:
        if self.login is not None:
            return f"Basic {base64.b64encode(self.login.encode()).decode()}"
        return None if self.key is None else f"Bearer {self.key}"

    @cached_property
    def _session(self) -> requests.Session:
        return new_session(self.concurrency)


def _escapable(character: str) -> str:
    return rf"(?:\\*{re.escape(character)}|\\+u(?i:{ord(character):04x}))"


def _failed(error: str) -> Reply:
    return Reply(None, "unreachable", error)


def _backoff(attempts: int) -> float:
    return min(_BACKOFF_MAX, BACKOFF * 2.0 ** min(attempts - 1, 10)) + BACKOFF * random.random()


def _retry_after(value: str) -> float:
    """Seconds, from a header that has seconds or a date; 0 if it has neither, or nothing that is to come."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_tz(value)
            seconds = mktime_tz(date) - time.time() if date else 0.0
        except (ValueError, LookupError, TypeError, OverflowError):
            seconds = 0.0
    return min(RETRY_AFTER_MAX, max(0.0, seconds))
