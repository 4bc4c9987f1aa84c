"""What a client asked for at once, and the pieces of its answers as they come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.errors import BackendLost, DeadlineExceeded, InvalidRequest, Overloaded, RadixmeshError
from engine.run.answer import Answer
from engine.sched.request import Output, Request
from engine.sched.scores import Score
from engine.sched.stop import Finish

if TYPE_CHECKING:
    from engine.serve.service import Service


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What a turn added to one answer of a Call. index: of the answer; finish: None until the last piece. scores: of
    the tokens; prompt_scores: of the prompt, with the first piece; both empty where they weren't asked for. first:
    whether it is an answer's first."""

    index: int
    text: str
    tokens: tuple[int, ...]
    finish: Finish | None
    scores: tuple[Score, ...] = ()
    prompt_scores: tuple[Score, ...] = ()
    first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A request that ended. Times are seconds: queue until its first row was sent to the device, prefill until its
    first token, decode until its end. reason: a Finish.kind. call: id of the Call, as its client knows it; route: what
    it came by."""

    rid: str
    call: str
    route: str
    reason: str
    error: str | None
    prompt_tokens: int
    cached_tokens: int
    made_tokens: int
    queue: float
    prefill: float
    decode: float

    @property
    def total(self) -> float:
        """Seconds from arrival to end."""
        return self.queue + self.prefill + self.decode


@dataclass(slots=True, kw_only=True)
class Timing:
    """When things happened to a request, on the monotonic clock; 0 = not yet."""

    arrival: float
    begun: float = 0.0
    first: float = 0.0


@dataclass(slots=True, eq=False)
class Call:
    """What a client asked for at once: several answers, read together. Closing it aborts those that are open.

    expired: its deadline passed, and what was made by then was given."""

    service: Service
    id: str
    route: str = ""
    answers: list[Answer] = field(default_factory=list)
    times: list[Timing] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    left: int = 0
    expired: bool = False
    _closed: bool = False
    _news: deque[tuple[int, Output]] = field(default_factory=deque)
    _waiter: asyncio.Future[None] | None = None

    def add(self, request: Request) -> None:
        """One more answer."""
        self.answers.append(Answer.of(request, self.service.tokenizer))
        self.times.append(Timing(arrival=request.arrival))
        self.made.append(0)
        self.left += 1

    def put(self, index: int, output: Output, now: float) -> None:
        """News of an answer."""
        self._news.append((index, output))
        self.made[index] += len(output.tokens)
        if output.tokens and not self.times[index].first:
            self.times[index].first = now
        if output.finish is not None:
            self.left -= 1
            self.service._record(self, index, output, now)

    def wake(self) -> None:
        """There is something to read."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def first(self) -> None:
        """Wait for the first news. Raises what refused it."""
        await self._wait()
        for _, output in self._news:
            refused = isinstance(output.error, (InvalidRequest, Overloaded, BackendLost, DeadlineExceeded))
            if refused and output.error is not None and not self._partial(output.error):
                raise output.error

    def _partial(self, error: RadixmeshError) -> bool:
        """Whether an error leaves what was made before it: a deadline does, where any answer has made a token."""
        return isinstance(error, DeadlineExceeded) and any(self.made)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What is new, until all answers ended. Raises the error of an answer that failed; all are aborted then.

        An answer that was aborted ends with a finish of kind "abort", and so does one whose deadline passed, with what
        it has made; when no answer has made anything by then, DeadlineExceeded is raised.
        """
        try:
            while self.left or self._news:
                await self._wait()
                batch = []
                while self._news:
                    index, output = self._news.popleft()
                    if output.error is not None:
                        if not self._partial(output.error):
                            raise output.error
                        self.expired = True
                    answer = self.answers[index]
                    before, told, first = len(answer.scores), len(answer.prompt_scores), not answer.ids
                    text = answer.take(output)
                    piece = Piece(
                        index=index,
                        text=text,
                        tokens=output.tokens,
                        finish=output.finish,
                        scores=tuple(answer.scores[before:]),
                        prompt_scores=tuple(answer.prompt_scores[told:]),
                        first=first,
                    )
                    batch.append(piece)
                yield batch
        finally:
            self.close()

    async def whole(self) -> list[Answer]:
        """All answers, when all have ended. Raises as `pieces` does."""
        async for _ in self.pieces():
            pass
        return self.answers

    def close(self) -> None:
        """Abort the answers that have not ended. Harmless afterwards."""
        for answer in () if self._closed else self.answers:
            rid = answer.request.rid
            if self.service._calls.get(rid, (None, 0))[0] is self:
                self.service._abort(rid)
        self._closed = True

    async def _wait(self) -> None:
        while not self._news:
            self._waiter = self.service._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
