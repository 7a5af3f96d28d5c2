"""A judge behind HTTP whose server does what no server should: each answer is counted, and within limits."""

import asyncio
import base64
import dataclasses
import gzip
import json
import threading
import time
from urllib.parse import quote

import pytest
from judge_server import Server, completion

from cme.errors import CMEError

pytest.importorskip("openai")

from cme.evaluation.winrate import endpoint
from cme.evaluation.winrate.endpoint import EndpointJudge
from cme.evaluation.winrate.options import Options

KEY = "sk-secret-of-mine"
GOOD = json.dumps(completion("Verdict: 1")).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(GOOD)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    server = Server(lambda text, number: "Verdict: 1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def judge_at(url, login=None, **options):
    if login is not None:
        url = url.replace("://", f"://{quote(login, safe=':')}@")
    return EndpointJudge(Options(judge=url, judge_model="judge", **options))


def ask(server, behave, **options):
    """The reply to one call, and how many requests it took."""
    server.behave = behave
    server.requests.clear()
    replies = []
    judge = judge_at(server.url, **{"retries": 2, "timeout": 10.0, **options})
    judge.ask(["?"], lambda index, reply: replies.append(reply))
    (reply,) = replies
    assert reply.attempts == len(server.requests)
    return reply


def test_in_an_event_loop_the_remedy_is_told_and_works(server):
    judge, replies = judge_at(server.url), []

    async def notebook():
        with pytest.raises(CMEError, match=r"an event loop is running here.*await asyncio.to_thread\(compare"):
            judge.ask(["?"], lambda index, reply: replies.append(reply))
        await asyncio.to_thread(judge.ask, ["?"], lambda index, reply: replies.append(reply))

    asyncio.run(notebook())
    assert [reply.answer for reply in replies] == ["Verdict: 1"]


def then_good(answer):
    return lambda text, number: answer if number == 1 else "Verdict: 1"


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [],
        "many",
        *({"prompt_tokens": count} for count in ("12", 1.5, True, -1, 10**30, [], None)),
    ],
)
def test_a_count_of_tokens_that_is_none_is_unknown(server, usage):
    body = {**completion("Verdict: 1"), "usage": usage}
    reply = ask(server, lambda text, number: (200, {}, body))
    assert (reply.answer, reply.failure, reply.prompt_tokens) == ("Verdict: 1", None, None)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"choices": ' + "[" * 100_000,
        "",
        "null",
        "[]",
        '{"choices": {"0": 1}}',
        '{"choices": [{"message": "Verdict: 1"}]}',
        "9" * 5000,
        "\x00\ud7ff",
    ],
)
@pytest.mark.parametrize("status", [200, 400, 599])
def test_whatever_a_server_answers_is_a_failure_that_is_counted(server, content, status):
    reply = ask(server, lambda text, number: (status, {}, content))
    assert reply.failure in ("unreachable", "refused")
    assert len(reply.error) < 2000


def test_a_nested_reason_for_no_text_is_a_failure(server):
    nested = json.dumps(completion(None, "deep")).replace('"deep"', "[" * 60 + "]" * 60)
    assert ask(server, lambda text, number: (200, {}, nested)).failure == "refused"


@pytest.mark.parametrize(
    "pieces",
    [
        [b"nonsense\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nno gzip"],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"],
        [HEAD, GOOD[:20]],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n", GOOD[:20]],
        [],
    ],
)
def test_an_answer_that_breaks_off_is_asked_for_again(server, pieces):
    reply = ask(server, then_good(pieces))
    assert (reply.answer, reply.attempts) == ("Verdict: 1", 2)
    reply = ask(server, lambda text, number: pieces)
    assert (reply.failure, reply.attempts) == ("unreachable", 3)
    assert "no answer from" in reply.error


@pytest.mark.parametrize("where", ["headers", "body", "chunk", "line of a chunk"])
def test_the_time_limit_is_on_the_whole_answer(server, where):
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    drops = {
        "headers": [b"HTTP/1.1 200 OK\r\nX: ", *[b"x"] * 400],
        "body": [b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n", *[b" "] * 400],
        "chunk": [chunked + b"190\r\n", *[b" "] * 400],
        "line of a chunk": [chunked, *[b"0"] * 400],
    }
    server.pause = 0.05  # so the whole would take 20 seconds
    reply = ask(server, lambda text, number: drops[where], timeout=0.3, retries=0)
    assert reply.failure == "unreachable"
    assert "timed out" in reply.error
    assert server.hung_up.wait(10)  # long before its last byte


def test_a_connection_that_is_used_again_has_the_whole_time_again(server):
    server.behave = lambda text, number: time.sleep(0.3) or "Verdict: 1"
    judge = judge_at(server.url, timeout=0.8, retries=0, concurrency=1)
    replies = []
    judge.ask(["?"] * 4, lambda index, reply: replies.append(reply))
    assert [reply.failure for reply in replies] == [None] * 4


def test_a_time_without_end(server):
    assert ask(server, lambda text, number: "Verdict: 1", timeout=float("inf")).failure is None


@pytest.mark.parametrize("status", [200, 302, 400, 500])
def test_a_body_is_read_to_a_limit(server, monkeypatch, status):
    monkeypatch.setattr(endpoint, "MAX_BODY", 100_000)
    endless = [b"HTTP/1.1 %d X\r\nLocation: /x\r\n\r\n" % status, *[b"x" * 100_000] * 1000]
    if status == 302:
        with pytest.raises(CMEError, match="points to"):
            ask(server, lambda text, number: endless)
    else:
        reply = ask(server, lambda text, number: endless, retries=0)
        assert reply.failure in ("unreachable", "refused")
        assert len(reply.error) < 2000
    assert server.hung_up.wait(10)  # after a part of its 100 MB


def test_a_compressed_body_is_limited_by_what_it_holds(server, monkeypatch):
    monkeypatch.setattr(endpoint, "MAX_BODY", 100_000)
    bomb = gzip.compress(GOOD + b" " * 50_000_000)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    reply = ask(server, lambda text, number: [head, bomb])
    assert (reply.failure, reply.attempts) == ("unreachable", 1)
    assert "more than" in reply.error


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "", "Sun, 99 Foo 2020", "Thu, 01 Jan 1970 00:00:00 GMT"])
def test_a_time_to_wait_that_is_none_is_passed_over(server, value):
    reply = ask(server, then_good((429, {"Retry-After": value}, "")))
    assert (reply.answer, reply.attempts) == ("Verdict: 1", 2)


@pytest.mark.parametrize(
    ("login", "secret"),
    [
        (None, KEY),
        (f"me:{KEY}", KEY),
        ("somebody:pw", "somebody:pw"),
        (f"me:{KEY}", base64.b64encode(f"me:{KEY}".encode()).decode()),
    ],
)
@pytest.mark.parametrize(
    "answer",
    [
        lambda secret: (200, {}, completion(f"Verdict: 1\nYou sent {secret}")),
        lambda secret: (200, {}, completion(None, secret)),
        lambda secret: (200, {}, secret),
        lambda secret: (200, {}, "x" * 195 + secret),
        lambda secret: (400, {}, {"error": {"message": f"Bearer {secret} is wrong"}}),
        lambda secret: (400, {}, {"error": secret}),
        lambda secret: (400, {}, secret),
        lambda secret: (400, {}, json.dumps({"detail": secret}).replace("/", "\\/")),
        lambda secret: (400, {}, json.dumps({"detail": json.dumps(secret).replace("s", "\\u0073")})),
        lambda secret: (400, {}, "".join(f"\\u{ord(c):04X}" for c in secret)),
        lambda secret: (500, {}, {"error": {"message": [secret]}}),
        lambda secret: (401, {}, {"error": {"message": secret}}),
        lambda secret: (302, {"Location": f"/?key={secret}"}, ""),
    ],
)
def test_a_server_that_echoes_what_it_was_sent_gives_no_key_away(server, monkeypatch, login, secret, answer):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    try:
        reply = ask(server, lambda text, number: answer(secret), retries=0, login=login)
        told = str(dataclasses.asdict(reply))
    except CMEError as error:
        told = str(error)
    assert "[key]" in told
    assert secret[:5] not in told


def test_a_placeholder_for_a_key_leaves_answers_as_they_are(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "1")
    assert ask(server, lambda text, number: "Verdict: 1").answer == "Verdict: 1"


@pytest.mark.parametrize("key", [f"sk\r\nX: {KEY}", f"{KEY}é", f"sk\u2028{KEY}", f"sk\x07{KEY}"])
def test_a_key_that_is_none_is_refused_without_showing_it(monkeypatch, key):
    monkeypatch.setenv("MINE", key)
    with pytest.raises(CMEError, match="environment variable MINE") as caught:
        judge_at("http://127.0.0.1/v1", judge_key_env="MINE")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:port/v1", "http://[::1/v1", "http://"])
def test_a_url_that_cannot_be_asked_is_refused(url):
    with pytest.raises(CMEError, match="--judge is no URL"):
        judge_at(url)


def test_an_error_in_recording_ends_the_asking_once_the_calls_in_flight_are_recorded(server):
    server.behave = lambda text, number: time.sleep(0.2 if number > 1 else 0) or "Verdict: 1"
    recorded = []

    def record(index, reply):
        recorded.append(index)
        if len(recorded) == 1:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        judge_at(server.url, concurrency=3).ask(["?"] * 20, record)
    assert len(recorded) == len(server.requests) == 3
