"""The loop, all of it: drain messages, plan, forward, collect the oldest, sample; and what carries it."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from backends.api.protocol import Backend
from backends.api.step import Ticket
from engine.errors import (
    BackendLost,
    DeviceFailed,
    InvalidRequest,
    ModelError,
    Overloaded,
    RadixmeshError,
    StepRefused,
)
from engine.model.weights import WeightSource
from engine.run.messages import Abort, Flush, Load, Message, News, Stats, Submit
from engine.run.sizes import SizeLog
from engine.run.start import Started
from engine.sched.request import Output
from engine.sched.rows import Plan
from engine.sched.scheduler import Scheduler
from engine.sched.stop import Finish

if TYPE_CHECKING:
    from engine.run.events import Publisher

COLLECT_SECONDS = 240.0
AUDIT_STEPS = 256
"""How often the pages are counted."""
STATS_SECONDS = 0.5
"""How often a busy loop says how it stands."""


class Loop:
    """One scheduler and one backend, `depth` steps in flight. emit: called with what is new after each step. clock:
    seconds, which the scheduler is told. weights: opens those of a Load. publisher: is told what
    came into the cache and went.

    doing: what the backend was asked for last, for whoever finds the loop stuck; since: when, on the monotonic clock.
    sizes: where the sizes of steps are logged.
    begun: requests that were first sent to the device, and how long each had waited; whoever reads it empties it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        backend: Backend,
        emit: Callable[[Sequence[Output]], None],
        depth: int = 0,
        clock: Callable[[], float] = time.monotonic,
        weights: Callable[[str], WeightSource] | None = None,
        publisher: Publisher | None = None,
        sizes: SizeLog | None = None,
    ) -> None:
        self._weights, self.publisher = weights, publisher
        self.scheduler, self.backend, self.emit, self.clock = scheduler, backend, emit, clock
        self.sizes = sizes
        self.depth = depth or backend.limits.depth
        self.steps = self.made = 0
        self.doing, self.since = "idle", time.monotonic()
        self.begun: list[tuple[str, float]] = []
        self._out: deque[tuple[Ticket, Plan]] = deque()

    @property
    def busy(self) -> bool:
        """Whether there is anything to plan or to collect."""
        return bool(self._out) or self.scheduler.busy

    def take(self, messages: Sequence[Message]) -> None:
        """Hand messages to the scheduler; a request that it refuses is answered with its error."""
        for message in messages:
            if isinstance(message, Submit):
                try:
                    self.scheduler.submit(message.request, self.clock())
                except (InvalidRequest, Overloaded) as error:
                    self.emit([_refusal(message.request.rid, error)])
            elif isinstance(message, Abort):
                output = self.scheduler.abort(message.rid)
                if output is not None:
                    self.emit([output])
            elif isinstance(message, Flush):
                self.emit([self._flush(message.rid)])
            elif isinstance(message, Load):
                self.emit([self._load(message)])

    def publish(self) -> None:
        """Tell what came into the cache and went since the last time."""
        if self.publisher is not None and (events := self.scheduler.store.tree.drain()):
            self.publisher.publish(events)

    def stats(self) -> Stats:
        """How it stands."""
        s = self.scheduler
        return Stats(
            running=len(s.running),
            waiting=len(s.waiting),
            waiting_tokens=s.waiting.tokens,
            steps=self.steps,
            preemptions=s.preemptions,
            repairs=s.repairs,
            prompt_tokens=s.prompt_tokens,
            cached_tokens=s.cached_tokens,
            made_tokens=self.made,
            events_dropped=0 if self.publisher is None else self.publisher.dropped,
            accounts=tuple(s.accounts()),
            status=self.backend.status(),
        )

    def turn(self) -> None:
        """One turn. Raises BackendLost after every open request was told."""
        try:
            self._turn()
        except DeviceFailed as error:
            self._out.clear()
            self.emit(self.scheduler.device_failed(error))
        except BackendLost as error:
            self._out.clear()
            self.emit(self.scheduler.lost(error))
            raise

    def _turn(self) -> None:
        if (limits := self.backend.limits).max_tokens > self.scheduler.limits.max_tokens:  # more programs are ready
            self.scheduler.grow(limits)
        now = self.clock()
        if expired := self.scheduler.expire(now):
            self.emit(expired)
        plan = self.scheduler.plan(now)
        plan = plan and self._forward(plan)
        if self._out and (plan is None or (len(self._out) >= self.depth and self._out[0][1] is not plan)):
            self._collect()
        if plan is not None:
            self.backend.sample(self._out[-1][0], self.scheduler.masks(plan))
            if self.depth == 1:
                self._collect()

    def _audit(self) -> None:
        accounts = self.scheduler.accounts()
        if not self.scheduler.audit():
            print(f"radixmesh: pages were lost and found: {accounts}", file=sys.stderr, flush=True)

    def _flush(self, rid: str) -> Output:
        if self.busy:
            return _refusal(rid, InvalidRequest("flush_cache: requests are open; try again when none is"))
        self.scheduler.flush()
        return Output(rid=rid, finish=Finish(kind="stop"))

    def _load(self, message: Load) -> Output:
        """New weights, in order with the forwards: steps that are out keep the old ones. Where the new can't be taken
        these serve on."""
        if self._weights is None:
            return _refusal(message.rid, InvalidRequest("path: this engine takes no other weights", field="path"))
        version = self.scheduler.store.tree.version + 1
        self.since, self.doing = time.monotonic(), f"load of {message.path}"
        try:
            self.backend.load(self._weights(message.path), version)
        except (ModelError, InvalidRequest) as error:
            return _refusal(message.rid, error)
        except DeviceFailed as error:
            self._out.clear()
            self.emit(self.scheduler.device_failed(error))
            return _refusal(message.rid, error)
        self.scheduler.renew(version)
        return Output(rid=message.rid, finish=Finish(kind="stop"), version=version)

    def _asks(self, what: str, plan: Plan) -> None:
        self.since = time.monotonic()
        self.doing = f"{what} of step {plan.step.step}: {len(plan.step.slots)} rows, {len(plan.step.tokens)} tokens"

    def _forward(self, plan: Plan) -> Plan | None:
        while True:
            try:
                self._asks("forward", plan)
                self._out.append((self.backend.forward(plan.step), plan))
            except StepRefused as error:
                slim, outputs = self.scheduler.refused(plan, error)
                self.emit(outputs)
                if slim is None:
                    return None
                plan = slim
            else:
                self.steps += 1
                if self.sizes is not None:
                    self.sizes.add(plan.step)
                if self.steps % AUDIT_STEPS == 0:
                    self._audit()
                for row in plan.rows:
                    if not row.run.begun:
                        row.run.begun = True
                        self.begun.append((row.run.request.rid, time.monotonic() - row.run.request.arrival))
                return plan

    def _collect(self) -> None:
        ticket, plan = self._out.popleft()
        self._asks("collect", plan)
        outputs = self.scheduler.commit(plan, self.backend.collect(ticket, COLLECT_SECONDS))
        self.made += sum(len(o.tokens) for o in outputs)
        self.emit(outputs)


def _refusal(rid: str, error: RadixmeshError) -> Output:
    return Output(rid=rid, finish=Finish(kind="error"), error=error)


class Carrier:
    """Runs a loop between an inbox and a listener, until it is told to stop.

    receive: the messages that came; waits for one if `block`; None: stop. send: called once a turn at most.
    """

    def __init__(
        self,
        started: Started,
        receive: Callable[[bool], Sequence[Message] | None],
        send: Callable[[News], None],
    ) -> None:
        self.loop = Loop(
            started.scheduler,
            started.backend,
            self._keep,
            weights=started.weights,
            publisher=started.publisher,
            sizes=started.sizes,
        )
        self._started, self._receive, self._send = started, receive, send
        self._outputs: list[Output] = []
        self._told = 0.0

    def run(self) -> None:
        """Serve. Closes the backend; before that, every open request is told why."""
        reason: RadixmeshError = BackendLost("the engine's loop died; its traceback says why")
        self._say(idle=True)
        try:
            while (messages := self._receive(not self.loop.busy)) is not None:
                self.loop.take([self._ready(m) for m in messages])
                if self.loop.busy:
                    self.loop.turn()
                self.loop.publish()
                self._say(idle=not self.loop.busy)
            reason = BackendLost("the engine was shut down")
        except BackendLost as error:
            reason = error
        finally:
            self._keep(self.loop.scheduler.lost(reason))
            self._send(News(outputs=tuple(self._outputs), lost=reason))
            self._started.backend.close()
            if self._started.publisher is not None:
                self._started.publisher.close()

    def _ready(self, message: Message) -> Message:
        """With what only this side has: the search for stop strings."""
        if isinstance(message, Submit) and message.request.stopper is None and message.request.params.stop:
            stopper = self._started.stopper(message.request.params)
            return Submit(request=replace(message.request, stopper=stopper))
        return message

    def _keep(self, outputs: Sequence[Output]) -> None:
        self._outputs += outputs

    def _say(self, idle: bool) -> None:
        """Send what is new."""
        if idle:
            self.loop.doing = "idle"
        now, stats = time.monotonic(), None
        if idle or now - self._told >= STATS_SECONDS:
            stats, self._told = self.loop.stats(), now
            if self.loop.sizes is not None:
                self.loop.sizes.flush()
        if self._outputs or self.loop.begun or stats is not None:
            self._send(News(outputs=tuple(self._outputs), begun=tuple(self.loop.begun), stats=stats))
            self._outputs, self.loop.begun = [], []
