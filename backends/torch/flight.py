"""Steps that are out, and what came of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backends.api.seats import Scored, deal
from backends.api.step import F32, I32, NONFINITE, OK, Logprobs, StepResult, Ticket
from backends.torch.choosing import Scores
from backends.torch.inputs import Order


def mark(device: torch.device) -> Any:
    """A point in the device's time: an event, or on a CPU the clock."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A step that is out. started, done: marks. made: int64[2, O] on the host once `done` has happened; taps likewise.

    asked int32[R]: logprobs of the tokens; scores: those of the rows that ask. wanted: what is scored of prompts;
    prompts: how.
    """

    version: int
    asked: I32
    order: Order
    started: Any
    made: torch.Tensor
    taps: dict[str, torch.Tensor]
    scores: Scores | None
    wanted: Scored | None
    prompts: Scores | None
    done: Any

    def landed(self) -> bool:
        """Whether `done` has happened."""
        return isinstance(self.done, float) or bool(self.done.query())

    @property
    def micros(self) -> int:
        """Microseconds of the device between `started` and `done`."""
        if isinstance(self.done, float):
            return int(1e6 * (self.done - self.started))
        return int(1e3 * self.started.elapsed_time(self.done))


def result(ticket: Ticket, flight: Flight, micros: int) -> StepResult:
    """A step's result in the order of its rows and tokens. A row with non-finite logits has no token."""
    order, (made, finite) = flight.order, flight.made.numpy()
    if order.padded:
        made, finite = made[order.chosen], finite[order.chosen]
    rows = order.rows[order.chosen]
    count = len(flight.asked)
    tokens, counts, status = np.full((count, 1), -1, np.int32), np.zeros(count, np.int32), np.full(count, OK, np.uint8)
    tokens[rows, 0] = np.where(finite, made, -1)
    counts[rows], status[rows] = finite, np.where(finite, OK, NONFINITE)
    back = np.argsort(order.tokens)
    return StepResult(
        step=ticket,
        version=flight.version,
        tokens=tokens,
        counts=counts,
        status=status,
        logprobs=_logprobs(flight, rows, counts),
        prompt_logprobs=_prompts(flight),
        taps={name: value.numpy()[back] for name, value in flight.taps.items()},
        device_us=micros,
    )


def _logprobs(flight: Flight, rows: NDArray[np.int64], counts: I32) -> tuple[Logprobs | None, ...] | None:
    """Of the tokens made. rows int64[O]: that return one; counts int32[R]: tokens of each."""
    asked = flight.asked
    if not np.count_nonzero(asked != -1):
        return None
    told = rows[asked[rows] >= 0]  # as the scores stand
    order = np.argsort(told)
    order = order[counts[told[order]] > 0]
    scores = _host(flight.scores)
    some = None if scores is None else (scores[0][order], scores[1][order], scores[2][order])
    return deal(asked, np.where(asked >= 0, counts, 0), some)


def _prompts(flight: Flight) -> tuple[Logprobs | None, ...] | None:
    """Of the prompts' tokens."""
    wanted = flight.wanted
    return None if wanted is None else deal(wanted.asked, wanted.counts, _host(flight.prompts))


def _host(scores: Scores | None) -> tuple[F32, I32, F32] | None:
    """Scores as arrays."""
    if scores is None:
        return None
    return scores.own.numpy(), scores.ids.numpy().astype(np.int32), scores.top.numpy()
