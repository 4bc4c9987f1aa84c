"""Whose turn it is: calls that come too early are refused, and what is out is waited for."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection

from backends.api.check import check_masks, check_step
from backends.api.limits import Limits
from backends.api.seats import Asks, Seats
from backends.api.step import U32, ScheduleStep, Ticket
from engine.errors import StepRefused


def may_forward(
    step: ScheduleStep, loaded: bool, waiting: ScheduleStep | None, out: Collection[Ticket], limits: Limits
) -> None:
    """Refuse a forward that comes too early. waiting: a step that is not sampled yet; out: tickets to be collected."""
    if not loaded:
        raise StepRefused("weights: load comes before the first forward", field="weights")
    if waiting is not None:
        raise StepRefused(f"step: step {waiting.step} was not sampled yet", field="step")
    if len(out) >= limits.depth:
        raise StepRefused(f"step: {limits.depth} steps are out, collect one first", field="step")
    if step.step in out:
        raise StepRefused(f"step: step {step.step} is out already", field="step")


def may_sample(ticket: Ticket, waiting: ScheduleStep | None, masks: U32 | None, limits: Limits) -> ScheduleStep:
    """The step that waits, which this must be."""
    if waiting is None or waiting.step != ticket:
        raise StepRefused(f"ticket: {ticket} is not the last forward, or was sampled already", field="ticket")
    check_masks(masks, waiting, limits)
    return waiting


def may_collect(ticket: Ticket, out: Collection[Ticket], waiting: ScheduleStep | None = None) -> None:
    """Refuse any ticket but the oldest that was sampled. out: oldest first; waiting: may be the last of them."""
    if next(iter(out), None) != ticket or (waiting is not None and waiting.step == ticket):
        raise StepRefused(f"ticket: {ticket} is not the oldest step that was sampled", field="ticket")


def until(done: Callable[[], bool], timeout: float) -> bool:
    """Whether it was done before `timeout` seconds were over. jax and torch can't wait with a deadline, so this looks
    again after a part of the time waited."""
    start = time.monotonic()
    while not done():
        waited = time.monotonic() - start
        if waited > timeout:
            return False
        time.sleep(min(2e-5 + waited / 32, 1e-3))
    return True


class Turns:
    """For a backend whose device is elsewhere: the order of calls and the lengths of slots, kept on the host. Every
    method raises StepRefused and changes nothing then."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.loaded = limits, False
        self._seats = Seats(limits.slots)
        self._waiting: ScheduleStep | None = None
        self._out: OrderedDict[Ticket, None] = OrderedDict()

    def forward(self, step: ScheduleStep) -> None:
        """A step is to be enqueued."""
        may_forward(step, self.loaded, self._waiting, self._out, self.limits)
        check_step(step, self.limits)
        asks = Asks.of(step)
        self._seats.take(step, self._seats.before(step, asks), asks)
        self._waiting = step

    def sample(self, ticket: Ticket, masks: U32 | None) -> None:
        """The tokens of a step are to be chosen."""
        may_sample(ticket, self._waiting, masks, self.limits)
        self._out[ticket] = None
        self._waiting = None

    def collect(self, ticket: Ticket) -> None:
        """A step's result is wanted."""
        may_collect(ticket, self._out)
        del self._out[ticket]
