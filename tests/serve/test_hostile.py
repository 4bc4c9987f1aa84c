"""No request can take the server down: a corpus over raw sockets, and after each the canary sings the same song."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from typing import Any

import pytest

from tests.serve.harness import House, folder, house
from tests.serve.hostile import COMPLETE, CORPUS, Case, post

SECONDS = 20.0
CANARY = json.dumps({"prompt": "the dog", "max_tokens": 4, "temperature": 0}).encode()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(folder(tmp_path_factory.mktemp("model"))) as home:
        yield home


@pytest.fixture(scope="module")
def song(home: House) -> str:
    """What the canary sings before anything happened."""
    return sing(home)


def sing(home: House) -> str:
    (status, body), *_ = answers(talk(home.port, Case(name="", acts=(post(COMPLETE, CANARY),), statuses=frozenset())))
    assert status == 200, body
    return str(json.loads(body)["choices"][0]["text"])


def talk(port: int, case: Case) -> bytes:
    """Do what a case does, and give all that came back until the server closed. A server that keeps silent raises."""
    got: list[bytes] = []
    with socket.create_connection(("127.0.0.1", port), SECONDS) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        with suppress(BrokenPipeError, ConnectionResetError):  # it may have heard enough
            for act in case.acts:
                if isinstance(act, bytes):
                    sock.sendall(act)
                elif isinstance(act, float):
                    time.sleep(act)
                elif act == "half":
                    sock.shutdown(socket.SHUT_WR)
                elif act == "read":
                    got.append(sock.recv(500))
                else:
                    if act == "reset":
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return b""
        with suppress(ConnectionResetError):
            while piece := sock.recv(65536):
                got.append(piece)
    return b"".join(got)


class Kept(io.BytesIO):
    """What HTTPResponse takes for a socket, and does not close between answers."""

    def makefile(self, *_: Any, **__: Any) -> Kept:
        return self

    def close(self) -> None: ...


def answers(data: bytes) -> list[tuple[int, bytes]]:
    """Status and body of each answer."""
    stream, out = Kept(data), []
    while stream.tell() < len(data):
        answer = HTTPResponse(stream)  # type: ignore[arg-type]
        answer.begin()
        out.append((answer.status, answer.read()))
    return out


def check(case: Case, got: list[tuple[int, bytes]]) -> None:
    """Whether what came back is what must."""
    if not got:
        assert case.closes, "closed without a word"
        return
    assert len(got) >= case.answers or case.closes, got
    status, body = got[0]
    assert status in case.statuses, (status, body[:500])
    if status < 400 or case.field is None:
        return
    error = json.loads(body)["error"]
    field = error["param"] or ""
    assert field == case.field or field.startswith((f"{case.field}.", f"{case.field}[")), error
    assert error["message"]
    assert len(body) < 4000, "says too much"


def test_there_are_enough() -> None:
    assert len({case.name for case in CORPUS}) == len(CORPUS) >= 80


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_it_is_refused_and_the_canary_sings(
    home: House, song: str, case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        check(case, answers(talk(home.port, case)))
    except HTTPException as error:
        raise AssertionError(f"not HTTP: {error!r}") from error
    assert sing(home) == song
    home.settle()
    assert home.service.lost is None
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR], "something went wrong in the server"


def test_nothing_is_left_open(home: House, song: str) -> None:
    """After all of it: no file, no request, and it still sings."""
    before = len(os.listdir("/proc/self/fd"))
    for case in CORPUS[-80:]:
        with suppress(HTTPException):
            answers(talk(home.port, case))
    home.settle()
    home.until(lambda: len(os.listdir("/proc/self/fd")) <= before + 2, "files are left open")
    assert sing(home) == song
