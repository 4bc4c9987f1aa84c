"""`radixmesh bench serve`: its clients count what a server really sent, and it sees what went wrong."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import ConfigError
from radixmesh.bench import serve as bench
from radixmesh.bench.load import Wanted, load
from tests.serve.harness import House, folder, house


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(folder(tmp_path_factory.mktemp("model"))) as home:
        yield home


def test_it_counts_what_the_server_made(home: House) -> None:
    peer = bench.peer_at(home.url, None)
    assert peer.pid == os.getpid(), "the process that listens is found"
    home.records.clear()
    figures = bench.measure(peer, streams=6, seconds=0.3, made=8)
    assert figures["errors"] == {}
    assert figures["held_after"] == (0, 0)
    assert figures["tokens"] == figures["answers"] * 8
    assert figures["answers"] <= len(home.records) < figures["answers"] * 10 + 100
    assert sum(r.made_tokens for r in home.records) >= figures["tokens"] > 0
    assert figures["sockets"]["api"][0] == figures["sockets"]["api"][1]
    assert figures["cpu_us_per_token"]["api"] > 0
    assert figures["ttft_seconds"]["p50"] <= figures["ttft_seconds"]["max"]
    assert any("us of CPU per token" in line for line in bench.table({"it": figures}))


def test_each_request_of_a_workload_is_sent_once(home: House) -> None:
    peer = bench.peer_at(home.url, None)
    figures = bench.measure(peer, streams=3, seconds=0.1, made=2, name="shared", scale=0.03)
    assert (figures["errors"], figures["answers"], figures["tokens"]) == ({}, 2, 2 * 3)


def test_the_bare_server_sends_what_is_asked() -> None:
    figures = bench.measure_bare(streams=4, made=10, size=250, events=95)
    assert (figures["errors"], figures["answers"], figures["events"]) == ({}, 10, 100)
    assert 230 < figures["bytes_per_event"] < 300


def test_errors_are_counted(home: House) -> None:
    def ask(body: bytes, port: int = home.port) -> dict[str, int]:
        wanted = Wanted(
            host="127.0.0.1",
            port=port,
            path="/v1/completions",
            key=None,
            streams=2,
            requests=[body],
            seconds=5,
            count=2,
        )
        return dict(load(wanted)["errors"])

    assert ask(b'{"prompt": 1}') == {"status 400": 2}
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=lambda: [listening.accept()[0].close() for _ in range(2)])
        thread.start()
        assert ask(b"{}", port) == {"the server hung up": 2}
        thread.join()
    assert list(ask(b"{}", port).values()) == [2], "nobody listens"


def test_a_server_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('radixmesh: no such thing')")
    with pytest.raises(ConfigError, match="did not start: radixmesh: no such thing"), bench.started([str(broken)]):
        pass
    with pytest.raises(ConfigError, match="write it like"):
        bench.peer_at("https://x", None)
