"""The one path of a request, without a face: engine.serve.service over a loop in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from backends.api.random import fold
from engine.config import Config, load
from engine.errors import BackendLost, ContextOverflow, InvalidRequest, Overloaded
from engine.run.local import LocalClient
from engine.run.messages import Message, Submit
from engine.run.start import decide, start
from engine.sampling import SamplingParams
from engine.serve.call import Piece, Record
from engine.serve.service import Ask, Service
from engine.text.tokenizer import Tokenizer
from tests.text.made import made
from tests.tiny import tiny

T = TypeVar("T")
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=24, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_new_tokens=150, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, max_new_tokens=24, seed=7, ignore_eos=True)


class Case:
    """A loop that stays, and a service for each test's event loop."""

    def __init__(self, path: Path) -> None:
        self.path, self.tokenizer = path, Tokenizer.open(path)
        self.client = self.begin()

    def begin(self, queue: int = 3) -> LocalClient:
        given = {"backend": "reference", "cache.tokens": 1024, "sched.slots": 4, "sched.max_rows": 4}
        decided = decide(load(None, given), self.path)
        return LocalClient(partial(start, decided, lambda: self.tokenizer.words, queue=queue, queue_tokens=400))

    def run(self, body: Callable[[Service], Awaitable[T]], client: LocalClient | None = None) -> T:
        async def main() -> T:
            service = Service(client or self.client, self.tokenizer, Config().serve, "tiny")
            return await asyncio.wait_for(body(service), 60)

        return asyncio.run(main())


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    path = tmp_path_factory.mktemp("model")
    tokenizer = made("byte_level")
    tiny(path, vocab=len(tokenizer), max_len=192, eos=tokenizer.eos_token_id)
    tokenizer.save_pretrained(path)
    case = Case(path)
    yield case
    case.client.shutdown()


def ask(text: str = "the", params: SamplingParams = GREEDY, **more: Any) -> Ask:
    return Ask(text=text, params=params, **more)


async def texts(service: Service, *asks: Ask) -> list[str]:
    call = await service.open(asks)
    return [answer.text for answer in await call.whole()]


async def settle(service: Service) -> None:
    """Until no request is open and the engine said that it is idle."""
    while service.open_requests or service.stats is None or service.stats.held or service.stats.running:
        await asyncio.sleep(0.01)


def test_the_pieces_of_a_stream_join_to_the_whole(case: Case) -> None:
    async def body(service: Service) -> None:
        asks = [ask("the", SEEDED), ask("dog", SEEDED), ask("a", GREEDY)]
        whole = await texts(service, *asks)
        pieces: list[Piece] = []
        call = await service.open(asks)
        async with aclosing(call.pieces()) as stream:
            async for batch in stream:
                pieces += batch
        for i, text in enumerate(whole):
            mine = [p for p in pieces if p.index == i]
            assert "".join(p.text for p in mine) == text
            assert sum(len(p.tokens) for p in mine) == 24
            assert [p.finish is not None for p in mine] == [False] * (len(mine) - 1) + [True]

    case.run(body)


def test_n_answers_differ_and_the_first_is_that_of_one(case: Case) -> None:
    async def body(service: Service) -> None:
        one = await texts(service, ask("the", SEEDED))
        many = await texts(service, ask("the", SEEDED, n=3))
        again = await texts(service, ask("the", SEEDED, n=3))
        assert many == again
        assert many[:1] == one
        assert len(set(many)) == 3

    case.run(body)


def test_folded_seeds_are_64_bit_and_apart() -> None:
    for seed in (0, 7, 2**32, 2**64 - 1):
        folded = [fold(seed, i) for i in range(64)]
        assert folded[0] == seed
        assert len(set(folded)) == 64
        assert all(0 <= s < 2**64 for s in folded)
    assert fold(1, 1) != fold(2**32, 1)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ids": []}, InvalidRequest, "prompt"),
    ({"ids": [10**6]}, InvalidRequest, "prompt"),
    ({"ids": [-1]}, InvalidRequest, "prompt"),
    ({"ids": [1.5]}, InvalidRequest, "prompt"),
    ({"ids": [True]}, InvalidRequest, "prompt"),
    ({"ids": [5] * 400}, ContextOverflow, "prompt"),
    ({"ids": [5], "n": 0}, InvalidRequest, "n"),
    ({"ids": [5], "n": 65}, InvalidRequest, "n"),
    ({"ids": [5], "params": SamplingParams(stop_token_ids=(10**6,))}, InvalidRequest, "stop_token_ids"),
    ({"text": "\ud800"}, InvalidRequest, "prompt"),
    ({"messages": []}, InvalidRequest, "messages"),
    ({"ids": [5], "priority": 1 << 31}, InvalidRequest, "priority"),
    ({"ids": [5], "priority": 0.5}, InvalidRequest, "priority"),
    ({}, InvalidRequest, "prompt"),
]


@pytest.mark.parametrize(("given", "kind", "field"), REFUSED)
def test_what_is_refused_names_its_field_and_nothing_is_open(
    case: Case, given: dict[str, Any], kind: type[InvalidRequest], field: str
) -> None:
    async def body(service: Service) -> None:
        with pytest.raises(kind) as caught:
            await service.open([ask(), Ask(**({"params": GREEDY} | given))])
        assert caught.value.field == field
        assert service.open_requests == 0
        assert await texts(service, ask())

    case.run(body)


def test_what_can_not_be_said_to_the_engine_is_not_open(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(service: Service) -> None:
        def say(message: Message) -> None:
            if isinstance(message, Submit) and message.request.rid.endswith("-1"):
                raise InvalidRequest("it can't cross")
            said(message)

        said = service.client.say
        monkeypatch.setattr(service.client, "say", say)
        with pytest.raises(InvalidRequest, match="it can't cross"):
            await service.open([ask(params=LONG, n=3)])
        monkeypatch.undo()
        await settle(service)

    case.run(body)


def test_a_full_queue_refuses_and_the_others_go_on(case: Case) -> None:
    client = case.begin(queue=3)
    try:

        async def body(service: Service) -> None:
            calls = [await service.open([ask(params=LONG)]) for _ in range(4)]  # every slot
            waiting = [asyncio.ensure_future(service.open([ask("dog", LONG)])) for _ in range(3)]
            while service.open_requests < 7:
                await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="3 requests wait"):
                await service.open([ask("a", LONG)])
            wholes = [(await (await c).whole())[0] for c in waiting]
            assert {len(a.ids) for a in wholes} == {150}
            assert {len((await c.whole())[0].ids) for c in calls} == {150}
            await settle(service)

        case.run(body, client)

        async def wide(service: Service) -> None:
            calls = [await service.open([ask(params=LONG)]) for _ in range(4)]
            long = Ask(ids=[5] * 150, params=LONG)
            waiting = [asyncio.ensure_future(service.open([long])) for _ in range(2)]
            while service.open_requests < 6:
                await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="prompts of 300 tokens wait"):
                await service.open([long])
            assert service.abort("") == 6
            for c in (*calls, *[await w for w in waiting]):
                assert (await c.whole())[0].finish is not None
            await settle(service)

        case.run(wide, client)
    finally:
        client.shutdown()


def test_a_call_that_is_closed_gives_its_pages_back(case: Case) -> None:
    async def body(service: Service) -> None:
        records: list[Record] = []
        service.finished.append(records.append)
        call = await service.open([ask(params=LONG, n=2)])
        async with aclosing(call.pieces()) as stream:
            async for _ in stream:
                break
        await settle(service)
        assert [r.reason for r in records] == ["abort", "abort"]
        assert all(r.made_tokens < 150 for r in records)
        opening = asyncio.ensure_future(service.open([ask("dog", LONG)]))
        await asyncio.sleep(0)
        opening.cancel()  # before the first news
        with pytest.raises(asyncio.CancelledError):
            await opening
        await settle(service)
        await texts(service, ask())
        assert [r.reason for r in records][3:] == ["length"]  # a clean finish is no abort

    case.run(body)


def test_a_record_adds_up(case: Case) -> None:
    async def body(service: Service) -> None:
        records: list[Record] = []
        service.finished.append(records.append)
        await texts(service, Ask(ids=[5] * 100, params=GREEDY))
        await texts(service, Ask(ids=[5] * 100, params=GREEDY))
        first, second = records
        assert (first.prompt_tokens, first.made_tokens, first.reason) == (100, 24, "length")
        assert second.cached_tokens >= 80
        assert min(first.queue, first.prefill, first.decode) > 0
        assert first.total == pytest.approx(first.queue + first.prefill + first.decode)

    case.run(body)


def test_flush_empties_the_cache_but_not_under_a_request(case: Case) -> None:
    async def body(service: Service) -> None:
        await texts(service, Ask(ids=[9] * 64, params=GREEDY))
        call = await service.open([ask(params=LONG)])
        with pytest.raises(InvalidRequest, match="requests are open"):
            await service.flush()
        call.close()
        await settle(service)
        await service.flush()
        await asyncio.sleep(0.05)
        assert service.stats is not None
        assert sum(a.evictable for a in service.stats.accounts) == 0
        answer = (await (await service.open([Ask(ids=[9] * 64, params=GREEDY)])).whole())[0]
        assert answer.cached == 0

    case.run(body)


def test_drain_finishes_what_it_can_and_aborts_the_rest(case: Case) -> None:
    async def short(service: Service) -> None:
        call = await service.open([ask()])
        whole = asyncio.ensure_future(call.whole())
        assert await service.drain(30) == 0
        assert len((await whole)[0].ids) == 24
        with pytest.raises(Overloaded, match="shutting down"):
            await service.open([ask()])

    async def late(service: Service) -> None:
        call = await service.open([ask(params=LONG)])
        whole = asyncio.ensure_future(call.whole())
        assert await service.drain(0) == 1
        finish = (await whole)[0].finish
        assert finish is not None
        assert finish.kind == "abort"

    case.run(short)
    case.run(late)


def test_when_the_engine_goes_every_stream_is_told(case: Case) -> None:
    client = case.begin()

    async def body(service: Service) -> None:
        calls = [await service.open([ask(params=LONG)]) for _ in range(4)]
        await asyncio.to_thread(client.shutdown)
        for call in calls:
            with pytest.raises(BackendLost, match="shut down"):
                await call.whole()
        with pytest.raises(BackendLost):
            await service.open([ask()])
        with pytest.raises(BackendLost):
            await service.flush()
        assert not service.ready

    case.run(body, client)
