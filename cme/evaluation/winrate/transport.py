"""HTTP for a server that is not trusted: one limit on the time of a whole answer, and one on its size."""

from __future__ import annotations

import http.client
import io
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import InvalidURL
from urllib3 import Timeout
from urllib3.exceptions import HTTPError

MAX_BODY = 10_000_000
"""Bytes, decompressed."""

_CHUNK = 1 << 16
_LONGEST = 1e6  # seconds; a socket takes no more than 24 days


class NoAnswer(Exception):
    """No connection, no whole answer in time, or a connection that was lost on the way."""


@dataclass(frozen=True)
class Answer:
    """`body` is cut off after MAX_BODY bytes: `too_long`."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    too_long: bool


def new_session(concurrency: int) -> requests.Session:
    """With connections for so many threads."""
    session = _Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter(pool_maxsize=concurrency))
    return session


def post(session: requests.Session, url: str, json: Any, authorization: str | None, timeout: float) -> Answer:
    """One attempt; redirects are not followed.

    Args:
        authorization: the header of this name; None sends none, nor what a .netrc has.
        timeout: seconds until the last byte of the answer.

    Raises NoAnswer, and InvalidURL, of requests.
    """

    def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if authorization is not None:
            request.headers["Authorization"] = authorization
        return request

    try:
        with session.post(
            url,
            json=json,
            auth=authorize,
            timeout=Timeout(total=min(timeout, _LONGEST), connect=min(10.0, timeout)),  # type: ignore[arg-type]
            allow_redirects=False,
            stream=True,
        ) as response:
            body = _read(response)
            return Answer(response.status_code, response.headers, body[:MAX_BODY], len(body) > MAX_BODY)
    except InvalidURL:
        raise
    except (OSError, HTTPError) as error:  # requests' errors are OSErrors
        raise NoAnswer(_cause(error)) from error


def _read(response: requests.Response) -> bytes:
    body = bytearray()
    while len(body) <= MAX_BODY and (chunk := response.raw.read(_CHUNK, decode_content=True)):
        body += chunk
    return bytes(body)


def _cause(error: BaseException) -> str:
    while isinstance(error, requests.RequestException) and error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    return str(getattr(error, "reason", None) or error)


class _TimedFile(io.RawIOBase):
    """Reads from a socket until a deadline, however the other side doles the bytes out."""

    def __init__(self, raw: io.RawIOBase, connection: socket.socket) -> None:
        self._raw, self._connection = raw, connection
        seconds = connection.gettimeout()
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self._connection.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    """The socket's timeout, which is meant for a single read, is for status, headers and body together."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_TimedFile(self.fp.detach(), sock))


@cache
def _timed(connection: Any) -> Any:
    return type(connection.__name__, (connection,), {"response_class": _TimedResponse})


class _Adapter(HTTPAdapter):
    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        if pool.ConnectionCls.response_class is not _TimedResponse:
            pool.ConnectionCls = _timed(pool.ConnectionCls)
        return pool


class _Session(requests.Session):
    def get_redirect_target(self, *args: Any) -> None:
        """None: to follow a redirect, and even not to follow it, requests would read the whole body first."""
