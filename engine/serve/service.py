"""The one path of a request, whatever face it came through: check, template, tokenize, submit, detokenize.

A face turns its wire form into Asks, opens a Call and formats the Pieces that come; it does nothing else.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from engine.config import Serve
from engine.errors import BackendLost, ContextOverflow, InvalidRequest, Overloaded, RadixmeshError
from engine.run.answer import several
from engine.run.client import Client
from engine.run.messages import Abort, Flush, Load, News, Stats, Submit
from engine.sampling import SamplingParams
from engine.sched.admission import check_request, deadline
from engine.sched.request import Output, Request
from engine.sched.stop import Finish
from engine.serve.call import Call, Record
from engine.serve.reading import renamed
from engine.text.chat import render
from engine.text.tokenizer import Tokenizer

MAX_SALT = 1024
INLINE = 4096
"""Characters up to which a prompt is tokenized between two turns of the event loop; longer ones take a thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One prompt to be completed `n` times: text, ids or messages, whichever is given.

    field: what the face calls the prompt, for its errors; names: what it calls parameters, where that differs.
    namespace: keeps prefix caches apart. timeout: seconds from its arrival after which it ends; None is never.
    """

    params: SamplingParams
    text: str | None = None
    ids: Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    n: int = 1
    priority: int = 0
    namespace: tuple[str | int, ...] = ()
    timeout: float | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    field: str = "prompt"


def salted(salt: str | None) -> tuple[str, ...]:
    """The namespace of a cache_salt, which keeps its client's prefix cache apart. Raises InvalidRequest."""
    if salt is not None and len(salt) > MAX_SALT:
        raise InvalidRequest(f"cache_salt: at most {MAX_SALT} characters, got {len(salt)}", field="cache_salt")
    return (salt,) if salt else ()


class Service:
    """Carries requests between faces and one client. Everything but what a thread is used for runs on one event loop.

    name: of the model, as clients say it. finished: called with a Record for each request that ends. stats: the last
    that the engine told. draining: new calls are refused. lost: why the engine is gone. version: of the weights.
    """

    def __init__(self, client: Client, tokenizer: Tokenizer | None, config: Serve, name: str) -> None:
        self.client, self.tokenizer, self.config, self.name = client, tokenizer, config, name
        self.info = client.info
        self.finished: list[Callable[[Record], None]] = []
        self.stats: Stats | None = None
        self.draining = False
        self.lost: RadixmeshError | None = None
        self.created = int(time.time())
        self.version = client.info.status.version
        self._calls: dict[str, tuple[Call, int]] = {}
        self._waiting: dict[str, asyncio.Future[Output]] = {}
        self._heard = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        client.listen(self._hear)

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._calls)

    @property
    def ready(self) -> bool:
        """Whether a request would be taken."""
        return self.lost is None and not self.draining

    async def open(self, asks: Sequence[Ask], call: str = "", route: str = "") -> Call:
        """Check everything, submit all answers of all asks, and wait for the first news of any.

        So what is refused is refused before a face has sent anything. call: id that the client knows; "" makes one.
        route: for its Records.
        Raises InvalidRequest or ContextOverflow naming the field, Overloaded, BackendLost, DeadlineExceeded when it
        passes before any answer has a token.
        """
        self._admit()
        self._bound(asks)
        arrival = time.monotonic()
        opened = Call(service=self, id=call or uuid4().hex, route=route)
        for i, ask in enumerate(asks):
            ids = await self._ids(ask)
            for request in self._requests(ask, ids, opened.id if len(asks) == 1 else f"{opened.id}-{i}", arrival):
                try:
                    with renamed(ask.names):
                        check_request(request, self.info.limits, self.info.room, self._calls)
                except InvalidRequest as error:
                    name = ask.field if error.field in ("prompt", "token_ids") else error.field
                    where = f" (prompt {i} of the list)" if len(asks) > 1 else ""
                    raise type(error)(f"{error}{where}", field=name) from error
                opened.add(request)
        self._admit()  # making the ids took its time
        for answer in opened.answers:
            if answer.request.rid in self._calls:
                raise InvalidRequest(f"rid: {answer.request.rid!r} is in use", field="rid")
        try:
            for index, answer in enumerate(opened.answers):
                self.client.say(Submit(request=answer.request))  # what can't be said is not open: no news will end it
                self._calls[answer.request.rid] = (opened, index)
            await opened.first()
        except BaseException:
            opened.close()
            raise
        return opened

    async def ids(self, text: str, special: bool = True, name: str = "prompt") -> list[int]:
        """The ids of a text. Raises InvalidRequest naming the field."""
        tokenizer = self._text(name)
        try:
            if len(text) <= INLINE:
                return tokenizer.encode(text, special)
            return await asyncio.to_thread(tokenizer.encode, text, special)
        except InvalidRequest as error:
            raise InvalidRequest(str(error), field=name) from error

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of ids; special: with special tokens."""
        return self._text("tokens").decode(ids, skip_special_tokens=not special)

    async def flush(self) -> None:
        """Empty the prefix cache. Raises InvalidRequest while requests are open."""
        await self._ask(Flush(rid=f"flush-{uuid4().hex}"))

    async def update(self, path: str) -> int:
        """Take the weights in a folder; requests go on with them. Gives their version. Raises ModelError naming what is
        wrong with them, and then the old ones serve on."""
        self._admit()
        if not path or "\0" in path:
            raise InvalidRequest("path: name the folder of a model", field="path")
        output = await self._ask(Load(rid=f"load-{uuid4().hex}", path=path))
        self.version = output.version
        return output.version

    async def _ask(self, message: Flush | Load) -> Output:
        """Say what is answered by one Output, and wait for it. Raises its error."""
        answer = self._waiting[message.rid] = self._loop.create_future()
        try:
            self.client.say(message)
            output: Output = await answer
        finally:
            self._waiting.pop(message.rid, None)
        if output.error is not None:
            raise output.error
        return output

    def abort(self, rid: str) -> int:
        """End requests now: one, all answers of a Call, or with "" all. Gives how many."""
        rids = [r for r, (call, _) in self._calls.items() if not rid or rid in (r, call.id)]
        for r in rids:
            self._abort(r)
        return len(rids)

    async def drain(self, seconds: float) -> int:
        """Take no more calls, wait for the open ones, abort those that are left. Gives how many were aborted."""
        self.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._calls and self.lost is None:
                    self._heard.clear()
                    await self._heard.wait()
        left = self.abort("")
        with suppress(TimeoutError):  # their last pieces reach the faces
            async with asyncio.timeout(1.0):
                while self._calls and self.lost is None:
                    self._heard.clear()
                    await self._heard.wait()
        return left

    def _admit(self) -> None:
        if self.lost is not None:
            raise self.lost
        if self.draining:
            raise Overloaded("the server is shutting down; try again elsewhere")

    def _bound(self, asks: Sequence[Ask]) -> None:
        """Refuse what could never be taken, before anything is made of it."""
        if not asks:
            raise InvalidRequest("prompt: is empty", field="prompt")
        for ask in asks:
            if not 1 <= ask.n <= self.config.n:
                with renamed(ask.names):
                    raise InvalidRequest(f"n: must be between 1 and {self.config.n}, not {ask.n}", field="n")
            deadline(ask.timeout, 0.0)
        most = max(self.config.queue + self.info.limits.slots, self.config.n)
        if (count := sum(ask.n for ask in asks)) > most:
            name = asks[0].field.partition("[")[0]
            raise InvalidRequest(
                f"{name}: asks for {count} answers at once; {most} are taken (serve.queue)", field=name
            )

    def _text(self, name: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(f"{name}: there is no tokenizer (skip_tokenizer); give token ids", field=name)
        return self.tokenizer

    async def _ids(self, ask: Ask) -> Sequence[int]:
        if ask.ids is not None:
            if len(ask.ids) >= self.info.room:
                raise ContextOverflow(
                    f"{ask.field}: {len(ask.ids)} tokens, and the context holds {self.info.room} with at least one for "
                    "the answer",
                    field=ask.field,
                )
            for token in ask.ids:
                if isinstance(token, bool) or not isinstance(token, int):
                    raise InvalidRequest(f"{ask.field}: token ids must be integers", field=ask.field)
                if not 0 <= token < self.info.limits.vocab:
                    raise InvalidRequest(
                        f"{ask.field}: {token} is not in the vocabulary of {self.info.limits.vocab}", field=ask.field
                    )
            return ask.ids
        if ask.messages is not None:
            return await asyncio.to_thread(render, self._text(ask.field), ask.messages)
        if ask.text is None:
            raise InvalidRequest(f"{ask.field}: is missing", field=ask.field)
        return await self.ids(ask.text, name=ask.field)

    def _requests(self, ask: Ask, ids: Sequence[int], rid: str, arrival: float) -> list[Request]:
        """A request for each of the n answers."""
        words = ask.params.bad_words
        return several(
            Request(
                rid=rid,
                tokens=tuple(ids),
                params=ask.params,
                seed=secrets.randbits(64) if ask.params.seed is None else ask.params.seed,
                eos=frozenset(self.info.eos),
                arrival=arrival,
                priority=ask.priority,
                namespace=ask.namespace,
                deadline=deadline(ask.timeout, arrival),
                bad_words=self._text("bad_words").sequences(words) if words else (),
            ),
            ask.n,
        )

    def _abort(self, rid: str) -> None:
        with suppress(BackendLost):
            self.client.say(Abort(rid=rid))

    def _hear(self, news: News) -> None:
        """On the client's thread. A loop that is closed has nobody left to tell."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._deliver, news)

    def _deliver(self, news: News) -> None:
        """The news of a turn, on the event loop."""
        if news.stats is not None:
            self.stats, self.version = news.stats, news.stats.status.version
        self.lost = news.lost or self.lost
        now = time.monotonic()
        for rid, waited in news.begun:
            if rid in self._calls:
                call, index = self._calls[rid]
                call.times[index].begun = call.times[index].arrival + waited
        woken: dict[int, Call] = {}
        for output in news.outputs:
            if output.rid in self._calls:
                call, index = self._calls[output.rid]
                woken[id(call)] = call
                call.put(index, output, now)
                if output.finish is not None:
                    del self._calls[output.rid]
            elif output.rid in self._waiting and not self._waiting[output.rid].done():
                self._waiting[output.rid].set_result(output)
        if news.lost is not None:
            for rid, (call, index) in list(self._calls.items()):
                woken[id(call)] = call
                call.put(index, Output(rid=rid, finish=Finish(kind="error"), error=news.lost), now)
            self._calls.clear()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(news.lost)
        for call in woken.values():
            call.wake()
        self._heard.set()

    def _record(self, call: Call, index: int, output: Output, now: float) -> None:
        answer, t = call.answers[index], call.times[index]
        begun = t.begun or now
        first = t.first or now
        record = Record(
            rid=answer.request.rid,
            call=call.id,
            route=call.route,
            reason=output.finish.kind if output.finish is not None else "",
            error=None if output.error is None else str(output.error),
            prompt_tokens=len(answer.request.tokens),
            cached_tokens=output.cached_tokens,
            made_tokens=call.made[index],
            queue=begun - t.arrival,
            prefill=max(first - begun, 0.0),
            decode=max(now - first, 0.0),
        )
        for tell in self.finished:
            tell(record)
