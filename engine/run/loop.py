"""The loop, all of it: drain messages, plan, forward, collect the oldest, sample."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from backends.api.protocol import Backend
from backends.api.step import Ticket
from engine.errors import BackendLost, DeviceFailed, InvalidRequest, StepRefused
from engine.run.messages import Abort, Message, Submit
from engine.sched.request import Output
from engine.sched.rows import Plan
from engine.sched.scheduler import Scheduler
from engine.sched.stop import Finish

COLLECT_SECONDS = 300.0


class Loop:
    """One scheduler and one backend, `depth` steps in flight. emit: called with what is new after each step."""

    def __init__(
        self, scheduler: Scheduler, backend: Backend, emit: Callable[[Sequence[Output]], None], depth: int = 0
    ) -> None:
        self.scheduler, self.backend, self.emit = scheduler, backend, emit
        self.depth = depth or backend.limits.depth
        self.steps = 0
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
                    self.scheduler.submit(message.request)
                except InvalidRequest as error:
                    self.emit([Output(rid=message.request.rid, finish=Finish(kind="error"), error=error)])
            elif isinstance(message, Abort):
                output = self.scheduler.abort(message.rid)
                if output is not None:
                    self.emit([output])

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
        plan = self.scheduler.plan()
        plan = plan and self._forward(plan)
        if self._out and (plan is None or (len(self._out) >= self.depth and self._out[0][1] is not plan)):
            self._collect()
        if plan is not None:
            self.backend.sample(self._out[-1][0], self.scheduler.masks(plan))
            if self.depth == 1:
                self._collect()

    def _forward(self, plan: Plan) -> Plan | None:
        while True:
            try:
                self._out.append((self.backend.forward(plan.step), plan))
            except StepRefused as error:
                slim, outputs = self.scheduler.refused(plan, error)
                self.emit(outputs)
                if slim is None:
                    return None
                plan = slim
            else:
                self.steps += 1
                return plan

    def _collect(self) -> None:
        ticket, plan = self._out.popleft()
        self.emit(self.scheduler.commit(plan, self.backend.collect(ticket, COLLECT_SECONDS)))
