"""What a backend's host side knows of its slots, and what it works out of a step for its device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backends.api.check import NEUTRAL
from backends.api.step import F32, I32, Bool, Logprobs, ScheduleStep
from engine.errors import StepRefused

UNSEATED = -1


class Seats:
    """Of each slot its cached positions, exact as long as no row carries drafts, or UNSEATED, and whether its request
    has penalties, so that the device counts its tokens."""

    def __init__(self, slots: int) -> None:
        self._length: I32 = np.zeros(slots, np.int32)
        self._counted: Bool = np.zeros(slots, np.bool_)
        self.clear()

    def clear(self) -> None:
        """No slot is seated."""
        self._last: tuple[ScheduleStep, I32] | None = None  # a step whose rows may go on, and their lengths after it
        self._length.fill(UNSEATED)
        self._counted.fill(False)

    def before(self, step: ScheduleStep, asks: Asks, last: ScheduleStep | None = None) -> I32:
        """Lengths before the step, int32[R]. last: a step whose rows it has (check_step). Raises StepRefused for what a
        slot can't do."""
        if self._last is not None and self._last[0] is last:
            before = self._last[1]
            _refuse(before + step.lens > step.upper, "upper", "below the slot's own length")
            return before
        self._settle()
        before = np.where(step.starts < 0, self._length[step.slots], step.starts)
        over = before + step.lens > step.upper
        if np.count_nonzero(over) or np.count_nonzero(before == UNSEATED):
            _refuse(before == UNSEATED, "starts", "the slot was never seated")
            _refuse(over, "upper", "below the slot's own length")
        self.check_penalties(step, asks)
        return before

    def check_penalties(self, step: ScheduleStep, asks: Asks) -> None:
        """Refuse penalties that begin in mid-text."""
        if asks.counted is not None:
            late = asks.counted & (step.starts < 0) & ~self._counted[step.slots]
            _refuse(late, "sampling.penalty", "the slot was seated without penalties, so nothing was counted")

    def take(self, step: ScheduleStep, before: I32, asks: Asks) -> None:
        """The step is on its way."""
        after = before + step.lens
        if self._last is not None and before is self._last[1]:
            self._last = step, after
            return
        self._settle()
        seated = step.starts >= 0
        if np.count_nonzero(seated):
            self._length[step.slots] = after
            self._counted[step.slots[seated]] = False if asks.counted is None else asks.counted[seated]
        else:
            self._last = step, after

    def _settle(self) -> None:
        """Write down the lengths of rows that may not go on."""
        if self._last is not None:
            step, after = self._last
            self._length[step.slots], self._last = after, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asks:
    """What a step asks beyond its likeliest tokens. counted bool[R]: rows with penalties, None = there are none. any:
    whether any row has a penalty, a bias, a mask or logprobs of its tokens; draws: whether any that returns a token
    has a temperature."""

    counted: Bool | None
    any: bool
    draws: bool

    @classmethod
    def of(cls, step: ScheduleStep) -> Asks:
        """Read every step, so the usual answer, nothing, is found fast."""
        s, counted = step.sampling, None
        apart = s.penalty != NEUTRAL
        if np.count_nonzero(apart):
            counted = apart.any(axis=1)
        more = len(s.bias) or np.count_nonzero(step.masked) or np.count_nonzero(s.logprobs != -1)
        draws = bool(np.count_nonzero(s.temperature[step.output != 0]))
        return cls(counted=counted, any=counted is not None or bool(more), draws=draws)


def tally(step: ScheduleStep) -> I32:
    """A step's history as what the device keeps: int32[N, 3], (slot, token, twice the times it was put out, and one if
    it stood in the prompt), each slot and token once."""
    row, token, is_output = step.sampling.history.T
    keys, at = np.unique(row.astype(np.int64) << 32 | token, return_inverse=True)
    made = np.bincount(at, is_output, len(keys)).astype(np.int32)
    seen = np.bincount(at, 1 - is_output, len(keys)) > 0
    return np.stack([step.slots[keys >> 32], (keys & 0xFFFFFFFF).astype(np.int32), 2 * made + seen], 1).astype(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Tokens of prompts to be scored, N in the order of the rows. at int32[N]: fed token whose logits score; token
    int32[N]: what is scored. counts int32[R]: of each row; asked int32[R]: alternatives, -1 = none."""

    at: I32
    token: I32
    counts: I32
    asked: I32


def scored(step: ScheduleStep, before: NDArray[np.int32]) -> Scored | None:
    """What a step scores of its prompts, where any row asks. before int32[R]: lengths before the step."""
    if not np.count_nonzero(step.sampling.prompt_logprobs != -1):
        return None
    first, asked = step.sampling.prompt_logprobs.T.copy()
    ends, at, token = np.cumsum(step.lens), list[I32](), list[I32]()
    counts = np.zeros(len(asked), np.int32)
    for r in np.flatnonzero(asked >= 0).tolist():
        fed = int(step.lens[r] - step.drafts[r])  # guesses are no prompt
        begin, following = int(ends[r] - step.lens[r]), int(step.next[r])
        here = np.arange(max(int(first[r]) - 1 - int(before[r]), 0), fed - (following < 0), dtype=np.int32)
        at.append((begin + here).astype(np.int32))
        token.append(np.append(step.tokens[begin + 1 : begin + fed], np.int32(following))[here])
        counts[r] = len(here)
    return Scored(at=np.concatenate(at), token=np.concatenate(token), counts=counts, asked=asked)


def deal(
    asked: I32, counts: Sequence[int] | I32, scores: tuple[F32, I32, F32] | None
) -> tuple[Logprobs | None, ...] | None:
    """Logprobs of all rows, N tokens in the order of the rows, as StepResult has them. asked int32[R]: alternatives;
    counts int32[R]; scores: own float32[N], ids int32[N, K] and top float32[N, K], None = of no token."""
    most = int(asked.max())
    if most < 0:
        return None
    if scores is None:
        none = np.zeros((0, most), np.float32)
        scores = np.zeros(0, np.float32), none.astype(np.int32), none
    own, ids, top = scores
    out: list[Logprobs | None] = []
    end = 0
    for k, n in zip(asked.tolist(), np.asarray(counts).tolist(), strict=True):
        part, end = slice(end, end + n), end + n
        out.append(None if k < 0 else Logprobs(own=own[part], ids=ids[part, :k], top=top[part, :k]))
    return tuple(out)


def _refuse(bad: Bool, field: str, what: str) -> None:
    if bad.any():
        raise StepRefused(f"{field}: {what}", rows=np.flatnonzero(bad).tolist(), field=field)
