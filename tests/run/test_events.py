"""What a client hears of the cache is what the cache holds; a slow one costs the loop nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from engine.cache.events import BlockRemoved
from engine.config import load
from engine.errors import ConfigError
from engine.run.events import END, TOPIC, Publisher
from engine.run.messages import Flush
from engine.run.start import decide
from radixmesh.engine import Engine
from tests.tiny import tiny

ANY = "tcp://127.0.0.1:*"
SIZE: dict[str, Any] = {"vocab": 97, "max_len": 128, "hidden": 32, "q_heads": 2, "kv_heads": 1}
KEYS: dict[str, Any] = {"slots": 2, "max_tokens": 64, "cache_tokens": 256, "page": 8, "events": ANY, "replay": ANY}


class Listener:
    """A client as the documentation describes it. held: hash -> (parent, tokens, namespace)."""

    def __init__(self, address: str, replay: str) -> None:
        self.context = zmq.Context()
        self.stream, self.again = self.context.socket(zmq.SUB), self.context.socket(zmq.DEALER)
        self.stream.connect(address)
        self.stream.setsockopt(zmq.SUBSCRIBE, TOPIC)
        self.again.connect(replay)
        self.held: dict[int, tuple[int | None, tuple[int, ...], Any]] = {}
        self.next = self.live = self.repeated = 0

    def close(self) -> None:
        self.context.destroy(linger=0)

    def hear(self, last: int) -> None:
        """Take everything before number `last`, from the stream or, where that has left something out, again."""
        tries = 0
        while self.next < last:
            tries += 1
            assert tries < 1000, "nothing more is said"
            if self.stream.poll(10 if not self.live else 2000):
                _, number, payload = self.stream.recv_multipart()
                at = int.from_bytes(number, "big")
                if at > self.next:
                    self.repeat()
                if at == self.next:
                    self.take(payload)
                    self.live += 1
            else:
                self.repeat()

    def repeat(self) -> None:
        self.again.send_multipart([b"", self.next.to_bytes(8, "big")])
        while (answer := self.ask())[0] != END:
            assert int.from_bytes(answer[0], "big") == self.next, "a batch is missing"
            self.take(answer[1])
            self.repeated += 1

    def ask(self) -> list[bytes]:
        assert self.again.poll(20_000), "no answer"
        empty, *answer = self.again.recv_multipart()
        assert empty == b""
        return answer

    def take(self, payload: bytes) -> None:
        self.next += 1
        _, said = msgspec.msgpack.decode(payload)
        for kind, *rest in said:
            if kind == "BlockStored":
                hashes, parent, tokens, page, lora, medium, *more = rest
                assert (lora, medium) == (None, None)
                space = more[1] if more else [[]] * len(hashes)
                for i, (name, own) in enumerate(zip(hashes, space, strict=True)):
                    assert name not in self.held
                    assert parent is None or parent in self.held
                    self.held[name] = parent, tuple(tokens[i * page : (i + 1) * page]), own
                    parent = name
            elif kind == "BlockRemoved":
                for name in rest[0]:
                    del self.held[name]
            else:
                assert kind == "AllBlocksCleared"
                self.held.clear()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    for seed, name in enumerate(("old", "new")):
        tiny(tmp_path / name, seed=seed, **SIZE)
    with Engine(tmp_path / "old", backend="reference", skip_tokenizer=True, **KEYS) as engine:
        yield engine


def ask(engine: Engine, tokens: Sequence[int], salt: str = "") -> None:
    engine.generate(token_ids=list(tokens), sampling_params={"max_new_tokens": 3, "temperature": 0}, cache_salt=salt)


def test_a_client_knows_what_is_cached(engine: Engine, tmp_path: Path) -> None:
    loop = engine._client.carrier.loop
    publisher, tree = loop.publisher, loop.scheduler.store.tree
    assert publisher is not None
    ask(engine, range(40))
    listener = Listener(publisher.address, publisher.replay)

    def held(version: int) -> dict[int, Any]:
        """As the tree has it, hashed anew."""
        out = {}
        for space, root in tree.roots.items():
            stack = [(repr(space).encode(), None, child) for child in root.children.values() if space[0] == version]
            while stack:
                before, parent, node = stack.pop()
                for at in range(0, len(node.key), 32):
                    before = blake2b(before + node.key[at : at + 32], digest_size=8).digest()
                    name = int.from_bytes(before, "little")
                    tokens = tuple(np.frombuffer(node.key[at : at + 32], np.int32).tolist())
                    out[name], parent = (parent, tokens, list(space[1])), name
                stack += [(before, parent, child) for child in node.children.values()]
        return out

    def same(version: int = 0) -> int:
        listener.hear(publisher.next)
        assert listener.held == held(version)
        return len(listener.held)

    try:
        assert same() == 5
        assert listener.repeated, "what came before the subscription"
        i = 0
        while i < 20 or (not listener.live and i < 1000):  # evictions, splits, and a tenant of its own
            i += 1
            ask(engine, [*range(8 * (i % 5)), *range(50, 50 + 30 + i % 3)], salt="tenant" if i % 4 == 0 else "")
            same()
        assert listener.live, "the stream says nothing"
        assert {tuple(space) for _, _, space in listener.held.values()} == {(), ("tenant",)}
        assert same() <= 32
        engine.update_weights(tmp_path / "new")
        assert same(1) == 0
        ask(engine, range(40))
        assert same(1) == 5
        engine._streams.open(Flush(rid="flush"), "flush")
        assert [o.error for o in engine._streams.read("flush")] == [None]
        assert same(1) == 0
        assert publisher.dropped == 0
    finally:
        listener.close()


def test_who_publishes_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    go, send = threading.Event(), Publisher._send
    monkeypatch.setattr(Publisher, "_send", lambda self, *given: (go.wait(60), send(self, *given)))
    publisher = Publisher(ANY, ANY, queue=2)
    listener = Listener(publisher.address, publisher.replay)
    try:
        for i in range(100):
            publisher.publish([BlockRemoved(hashes=(i,))])
        assert publisher.next == 100
        assert 90 < publisher.dropped < 100
        go.set()
        listener.again.send_multipart([b"not", b"a", b"question"])
        listener.again.send_multipart([b"", (0).to_bytes(8, "big")])
        got = []
        while (answer := listener.ask())[0] != END:
            got.append((int.from_bytes(answer[0], "big"), msgspec.msgpack.decode(answer[1])[1]))
        assert len(got) + publisher.dropped <= 100
        assert got == [(i, [["BlockRemoved", [i], None]]) for i, _ in got], "a batch has another's number"
        assert got[0][0] == 0
    finally:
        go.set()
        listener.close()
        publisher.close()
    publisher.close()


def test_only_so_much_is_kept() -> None:
    publisher = Publisher(ANY, ANY, kept=3)
    listener = Listener(publisher.address, publisher.replay)
    try:
        for i in range(9):
            publisher.publish([BlockRemoved(hashes=(i,))])
        got: list[int] = []
        while not got or got[-1] != 8:  # until the thread has taken the last
            got = []
            listener.again.send_multipart([b"", (5).to_bytes(8, "big")])
            while (answer := listener.ask())[0] != END:
                got.append(int.from_bytes(answer[0], "big"))
        assert got == [6, 7, 8]
    finally:
        listener.close()
        publisher.close()


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"cache.events": "localhost:5557"}, "cache.events"),
        ({"cache.events": True}, "cache.events"),
        ({"cache.events": ANY, "cache.radix": False}, "cache.events"),
        ({"cache.replay": ANY}, "cache.replay"),
        ({"cache.replay": 7}, "cache.replay"),
    ],
)
def test_what_can_not_be_told_is_refused(given: dict[str, Any], field: str, tmp_path: Path) -> None:
    tiny(tmp_path, **SIZE)
    with pytest.raises(ConfigError) as caught:
        decide(load(None, {"backend": "reference", **given}), tmp_path)
    assert caught.value.field == field


def test_an_address_in_use_is_named(tmp_path: Path) -> None:
    tiny(tmp_path, **SIZE)
    publisher = Publisher(ANY)
    try:
        with pytest.raises(ConfigError, match=r"cache\.events: can't listen on"):
            Engine(tmp_path, backend="reference", skip_tokenizer=True, events=publisher.address)
        with pytest.raises(ConfigError, match=r"cache\.replay: can't listen on"):
            Publisher(ANY, publisher.address)
    finally:
        publisher.close()


def test_they_are_off_by_default(tmp_path: Path) -> None:
    tiny(tmp_path, **SIZE)
    with Engine(tmp_path, backend="reference", skip_tokenizer=True) as engine:
        loop = engine._client.carrier.loop
        assert loop.publisher is None
        assert loop.scheduler.store.tree.log is None
