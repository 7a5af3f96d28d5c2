"""A judge behind an OpenAI-compatible endpoint: a hosted model, or vLLM, llama.cpp, Ollama and others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.util import Retry

from cme.errors import CMEError
from cme.evaluation.winrate.cache import Failure
from cme.evaluation.winrate.judges import Reply

DEFAULT_OPTIONS: Mapping[str, Any] = {"temperature": 0, "max_tokens": 2048}
"""Of a request. A reasoning model spends tokens on thoughts that it does not show."""

RETRY_AFTER_MAX = 300
"""Seconds; most of what a server's Retry-After can make a call wait."""

BACKOFF = 1.0
"""Seconds before the second retry, doubled for each one after it; as much again, at random, is added."""

_PASSING = (408, 409, 429, 500, 502, 503, 504, 529)
_REMEDIES = {
    401: "the key is missing or wrong: put a valid one into the environment variable {key_env}",
    402: "the account has no credit left",
    403: "the key in the environment variable {key_env} may not use this model",
    404: "check --judge (it usually ends with /v1) and --judge-model",
    405: "check --judge (it usually ends with /v1)",
}


@dataclass(frozen=True)
class EndpointJudge:
    """Attributes:
    url: without /chat/completions.
    key: sent as a bearer token; None for servers that want none.
    key_env: where the key comes from, for error messages.
    options: what a request has besides the model and the message.
    timeout: seconds that the server may be silent.
    retries: further attempts after an answer of 429 or 5xx, no connection, or a timeout.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    key_env: str = "OPENAI_API_KEY"
    options: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_OPTIONS))
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 5

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
                record(index, self._ask(text))
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

    def _ask(self, text: str) -> Reply:
        start = time.monotonic()
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], **self.options}
        try:
            response = self._session.post(
                f"{self.url}/chat/completions",
                json=body,
                auth=_Bearer(self.key),
                timeout=(min(10.0, self.timeout), self.timeout),
                allow_redirects=False,
            )
        except requests.RequestException as error:
            reason = f"no answer from {self.url}: {_cause(error)}"
            return _failed("unreachable", reason, start, attempts=1 + self.retries)
        attempts = 1 + len(response.raw.retries.history)
        if response.status_code != 200:
            return self._refused(response, start, attempts)
        try:
            return _reply(response.json(), time.monotonic() - start, attempts)
        except (ValueError, LookupError, TypeError, AttributeError):
            reason = f"{self.url} did not answer as OpenAI's API does: {response.text[:200]!r}"
            return _failed("unreachable", reason, start, attempts)

    def _refused(self, response: requests.Response, start: float, attempts: int) -> Reply:
        code = response.status_code
        reason = f"{self.url} answered HTTP {code}: {_message(response)}"
        if code in _REMEDIES:
            raise CMEError(f"{reason}\n{_REMEDIES[code].format(key_env=self.key_env)}")
        if 300 <= code < 400:
            raise CMEError(f"{reason}\nit points to {response.headers.get('location')!r}: give that to --judge")
        return _failed("unreachable" if code in _PASSING else "refused", reason, start, attempts)

    @cached_property
    def _session(self) -> requests.Session:
        retry = Retry(
            total=self.retries,
            status_forcelist=_PASSING,
            allowed_methods=None,  # POST too: a call that is judged twice does no harm
            backoff_factor=BACKOFF,
            backoff_jitter=BACKOFF,
            backoff_max=60,
            retry_after_max=RETRY_AFTER_MAX,
            raise_on_status=False,
        )
        session = requests.Session()
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=self.concurrency))
        return session


@dataclass(frozen=True)
class _Bearer(AuthBase):
    """Given for every call, so that no key of a .netrc takes its place."""

    key: str | None

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.key is not None:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


def _reply(body: Any, seconds: float, attempts: int) -> Reply:
    choice = body["choices"][0]
    answer = choice["message"].get("content")
    usage = body.get("usage") or {}
    reason = choice.get("finish_reason")
    failure: Failure | None = None
    error = None
    if not isinstance(answer, str):
        answer, failure, error = None, "refused", f"the judge wrote no text (finish_reason: {reason})"
    return Reply(
        answer,
        failure,
        error,
        cut_off=reason == "length",
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        seconds=seconds,
        attempts=attempts,
    )


def _failed(failure: Failure, error: str, start: float, attempts: int) -> Reply:
    return Reply(None, failure, error, seconds=time.monotonic() - start, attempts=attempts)


def _message(response: requests.Response) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError):
        return response.text[:200].strip() or response.reason


def _cause(error: BaseException) -> str:
    while isinstance(error, requests.RequestException) and error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    return str(getattr(error, "reason", None) or error)
