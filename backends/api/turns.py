"""Whose turn it is, for a backend whose device is elsewhere: what must be refused before a step is sent."""

from __future__ import annotations

from collections import OrderedDict

from backends.api.check import check_masks, check_step
from backends.api.limits import Limits
from backends.api.seats import Asks, Seats
from backends.api.step import U32, ScheduleStep, Ticket
from engine.errors import StepRefused


class Turns:
    """The order of calls and the lengths of slots, kept on the host. Every method raises StepRefused and changes
    nothing then."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.loaded = limits, False
        self._seats = Seats(limits.slots)
        self._waiting: ScheduleStep | None = None
        self._out: OrderedDict[Ticket, None] = OrderedDict()

    def forward(self, step: ScheduleStep) -> None:
        """A step is to be enqueued."""
        if not self.loaded:
            raise StepRefused("weights: load comes before the first forward", field="weights")
        if self._waiting is not None:
            raise StepRefused(f"step: step {self._waiting.step} was not sampled yet", field="step")
        if len(self._out) >= self.limits.depth:
            raise StepRefused(f"step: {self.limits.depth} steps are out, collect one first", field="step")
        if step.step in self._out:
            raise StepRefused(f"step: step {step.step} is out already", field="step")
        check_step(step, self.limits)
        asks = Asks.of(step)
        self._seats.take(step, self._seats.before(step, asks), asks)
        self._waiting = step

    def sample(self, ticket: Ticket, masks: U32 | None) -> None:
        """The tokens of a step are to be chosen."""
        if self._waiting is None or self._waiting.step != ticket:
            raise StepRefused(f"ticket: {ticket} is not the last forward, or was sampled already", field="ticket")
        check_masks(masks, self._waiting, self.limits)
        self._out[ticket] = None
        self._waiting = None

    def collect(self, ticket: Ticket) -> None:
        """A step's result is wanted."""
        if next(iter(self._out), None) != ticket:
            raise StepRefused(f"ticket: {ticket} is not the oldest step that was sampled", field="ticket")
        del self._out[ticket]
