"""Clients that go away, whatever their request is at: its pages are back within two steps. Who stays is not aborted."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.run.messages import Abort, Message
from tests.serve.harness import House, folder, house

LONG = {"prompt": [5, 6, 7], "max_tokens": 120, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "the"}], "max_tokens": 120, "ignore_eos": True}
WIDE = {"prompt": list(range(10, 160)), "max_tokens": 20, "ignore_eos": True}
"""Some forty steps of prefill."""


@dataclass(slots=True)
class Watched:
    """What a loop was told to abort, and how many steps it had sent then and when the last page was back."""

    aborted: list[str] = field(default_factory=list)
    at: int = -1
    back: int = -1


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(folder(tmp_path_factory.mktemp("model")), slots=2, max_tokens=4) as door:
        yield door


@pytest.fixture
def watched(door: House, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    watched, loop = Watched(), door.client.carrier.loop
    take, turn = loop.take, loop.turn

    def taking(messages: Sequence[Message]) -> None:
        for message in messages:
            if isinstance(message, Abort):
                watched.aborted.append(message.rid)
                watched.at = loop.steps
        take(messages)
        look()

    def turning() -> None:
        turn()
        look()

    def look() -> None:
        if watched.at >= 0 and watched.back < 0 and not door.held:
            watched.back = loop.steps

    door.settle()
    monkeypatch.setattr(loop, "take", taking)
    monkeypatch.setattr(loop, "turn", turning)
    door.records.clear()
    yield watched
    door.settle()


def ask(door: House, path: str, body: dict[str, Any]) -> socket.socket:
    """A request on a connection of its own."""
    raw = socket.create_connection(("127.0.0.1", door.port), timeout=30)
    data = json.dumps(body).encode()
    raw.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
    return raw


def reset(raw: socket.socket) -> None:
    """Close without a word: the peer gets a reset."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def half(raw: socket.socket) -> None:
    """Say that nothing more is sent, and go on listening."""
    raw.shutdown(socket.SHUT_WR)
    while raw.recv(1 << 16):
        pass
    raw.close()


LEAVE = {"close": socket.socket.close, "reset": reset, "half": half}


@contextmanager
def slowly(door: House) -> Iterator[None]:
    with door.slow(0.02):
        yield


def ended(door: House, watched: Watched, count: int = 1) -> None:
    door.settle()
    assert len(watched.aborted) == count
    assert [r.reason for r in door.records] == ["abort"] * count
    assert 0 <= watched.back - watched.at <= 2, "pages were held for more than two steps"


@pytest.mark.parametrize("leave", LEAVE)
@pytest.mark.parametrize("stream", [True, False])
def test_in_decode(door: House, watched: Watched, stream: bool, leave: str) -> None:
    with slowly(door):
        raw = ask(door, "/v1/completions", LONG | {"stream": stream})
        if stream:
            assert raw.recv(1 << 16).startswith(b"HTTP/1.1 200")
        door.until(lambda: any(c.made[0] > 3 for c, _ in list(door.service._calls.values())), "nothing was made")
        LEAVE[leave](raw)
        ended(door, watched)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate"])
def test_other_routes(door: House, watched: Watched, path: str) -> None:
    body = CHAT if "chat" in path else {"text": "a", "sampling_params": {"max_new_tokens": 120, "ignore_eos": True}}
    with slowly(door):
        raw = ask(door, path, body | {"stream": True})
        raw.recv(1 << 16)
        raw.close()
        ended(door, watched)


@pytest.mark.parametrize("stream", [True, False])
def test_in_prefill(door: House, watched: Watched, stream: bool) -> None:
    with slowly(door):
        raw = ask(door, "/v1/completions", WIDE | {"stream": stream})
        door.until(lambda: door.held > 2, "it was never seated")
        raw.close()
        ended(door, watched)
    assert door.records[0].made_tokens == 0


@pytest.mark.parametrize("stream", [True, False])
def test_queued(door: House, watched: Watched, stream: bool) -> None:
    with slowly(door):
        others = [ask(door, "/v1/completions", LONG | {"stream": True}) for _ in range(2)]
        for other in others:
            other.recv(1 << 16)
        raw = ask(door, "/v1/completions", LONG | {"stream": stream})
        scheduler = door.client.carrier.loop.scheduler
        door.until(lambda: len(scheduler.waiting) == 1, "it does not wait")
        raw.close()
        door.until(lambda: len(door.records) == 1, "it waits for ever")
        assert not scheduler.waiting
        assert [r.reason for r in door.records] == ["abort"]
        assert door.service.open_requests == 2
        for other in others:
            other.close()
        door.settle()
    assert len(watched.aborted) == 3


def over(door: House, path: str) -> float:
    """Requests of a route that the app is done with, however they ended."""
    families = text_string_to_metric_families(httpx.get(f"{door.url}/metrics").text)
    return sum(s.value for f in families for s in f.samples if s.labels.get("route") == path)


def test_before_reading(door: House, watched: Watched) -> None:
    before = over(door, "/v1/completions")
    with slowly(door):
        for leave in (socket.socket.close, reset):
            leave(ask(door, "/v1/completions", LONG | {"stream": True}))
        door.until(lambda: over(door, "/v1/completions") == before + 2, "a request was never ended")
    door.settle()
    assert {r.reason for r in door.records} <= {"abort"}


def test_in_the_middle_of_a_body(door: House, watched: Watched) -> None:
    raw = socket.create_connection(("127.0.0.1", door.port), timeout=30)
    raw.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    before = over(door, "/generate")
    raw.close()
    door.until(lambda: over(door, "/generate") == before + 1, "a request was never ended")
    assert not door.records


def test_all_answers_of_a_call(door: House, watched: Watched) -> None:
    with slowly(door):
        raw = ask(door, "/v1/completions", LONG | {"stream": True, "n": 2})
        raw.recv(1 << 16)
        raw.close()
        ended(door, watched, count=2)


@pytest.mark.parametrize("stream", [True, False])
def test_a_clean_finish_aborts_nothing(door: House, watched: Watched, stream: bool) -> None:
    for path, body in (("/v1/completions", LONG), ("/v1/chat/completions", CHAT)):
        raw = ask(door, path, body | {"stream": stream, "max_tokens": 8, "n": 2})
        data = b""
        while not data.endswith((b"0\r\n\r\n", b"}}}")):
            data += raw.recv(1 << 16)
        raw.close()
    door.settle()
    assert not watched.aborted
    assert {r.reason for r in door.records} == {"length"}


def test_a_slow_reader_gets_everything_and_holds_no_pages(door: House, watched: Watched) -> None:
    """What it has not read is kept as tokens, not as pages; several steps come as one event then."""
    body = LONG | {"stream": True, "temperature": 0, "n": 8, "max_tokens": 150}
    door.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of the connections to come
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(30)
    raw.connect(("127.0.0.1", door.port))
    data = json.dumps(body).encode()
    raw.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
    door.until(lambda: len(door.records) == 8, "it was not made")
    door.until(lambda: not door.held, "pages are held")
    got = b""
    while not got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        got += raw.recv(1 << 16)
    raw.close()
    assert got.count(b"data: {") < 8 * 150 / 2
    texts = [""] * 8
    for line in got.split(b"\n"):
        if line.startswith(b"data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            texts[choice["index"]] += choice["text"]
    whole = ask(door, "/v1/completions", body | {"stream": False})
    answer = b""
    while not answer.endswith(b"}}}"):
        answer += whole.recv(1 << 16)
    whole.close()
    assert texts == [c["text"] for c in json.loads(answer.partition(b"\r\n\r\n")[2])["choices"]]
    assert not watched.aborted
