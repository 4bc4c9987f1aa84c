"""Steps made by hand: rows as plain values, and a small host that owns slots and pages. For tests and experiments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from backends.api.limits import Limits
from backends.api.protocol import Backend
from backends.api.step import F32, I32, TOKEN, U32, PageTable, Sampling, ScheduleStep, StepResult, Ticket

TOLERANCE = 2e-4
"""Of logits in float32, times max(1, their standard deviation)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a step; the fields are those of ScheduleStep and Sampling.

    bias: (token, value) pairs. history: (token, is_output) pairs. base: of each group's table, () = zeros.
    """

    slot: int
    tokens: Sequence[int]
    start: int = -1
    upper: int
    drafts: int = 0
    next: int = -1
    output: int = TOKEN
    masked: bool = False
    base: Sequence[int] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    penalty: tuple[float, float, float] = (1.0, 0.0, 0.0)
    bias: Sequence[tuple[int, float]] = ()
    history: Sequence[tuple[int, int]] = ()
    logprobs: int = -1
    prompt_logprobs: tuple[int, int] = (-1, -1)


def build(
    limits: Limits,
    number: int,
    rows: Sequence[Row],
    edits: Sequence[Sequence[tuple[int, int, int]]] = (),
    copies: Sequence[tuple[int, int, int, int]] = (),
    taps: Sequence[str] = (),
) -> ScheduleStep:
    """The step of these rows. edits: (slot, index, page) for each cache group."""

    def ints(name: str) -> I32:
        return np.array([getattr(r, name) for r in rows], np.int32)

    def floats(name: str) -> F32:
        return np.array([getattr(r, name) for r in rows], np.float32)

    return ScheduleStep(
        step=number,
        slots=ints("slot"),
        starts=ints("start"),
        lens=np.array([len(r.tokens) for r in rows], np.int32),
        upper=ints("upper"),
        drafts=ints("drafts"),
        tokens=np.array([t for r in rows for t in r.tokens], np.int32),
        next=ints("next"),
        output=np.array([r.output for r in rows], np.uint8),
        masked=np.array([r.masked for r in rows], np.bool_),
        adapters=np.zeros(len(rows), np.int32),
        tables=tuple(
            PageTable(
                edits=np.array(edits[g] if edits else [], np.int32).reshape(-1, 3),
                base=np.array([r.base[g] if r.base else 0 for r in rows], np.int32),
            )
            for g in range(len(limits.groups))
        ),
        sampling=Sampling(
            temperature=floats("temperature"),
            top_k=ints("top_k"),
            top_p=floats("top_p"),
            min_p=floats("min_p"),
            seed=np.array([r.seed for r in rows], np.uint64),
            penalty=floats("penalty"),
            logprobs=ints("logprobs"),
            prompt_logprobs=ints("prompt_logprobs"),
            bias=np.array([(i, *b) for i, r in enumerate(rows) for b in r.bias], np.float32).reshape(-1, 3),
            history=np.array([(i, *h) for i, r in enumerate(rows) for h in r.history], np.int32).reshape(-1, 3),
        ),
        copies=np.array(copies, np.int32).reshape(-1, 4),
        taps=tuple(taps),
    )


@dataclass(slots=True, kw_only=True)
class Text:
    """What the host keeps of one text on the device.

    pages: of each group, entry i at index i, the first at position `base`. owned: those that go back when it ends.
    upper: bound of its length. start: the cached length that it will be seated at, -1 afterwards.
    """

    slot: int
    start: int
    upper: int
    base: list[int]
    pages: list[list[int]]
    owned: list[list[int]]
    unsent: list[list[int]] = field(default_factory=list)


Placed: TypeAlias = tuple[Text, Row]


class Host:
    """Drives a backend through its protocol: owns free slots and pages, numbers the steps. taps: of every step.
    tolerance: of logits, times max(1, their standard deviation), where runs that should be alike are compared."""

    def __init__(self, backend: Backend, taps: Sequence[str] = (), tolerance: float = TOLERANCE) -> None:
        self.tolerance = tolerance
        self.backend, self.limits, self.taps, self.number = backend, backend.limits, taps, 0
        self.slots = list(range(self.limits.slots))
        self.free = [list(range(pages)) for pages in self.limits.pages]

    def open(self, shared: Text | None = None, cached: int = 0) -> Text:
        """A text on a free slot; it reads the first `cached` positions from the pages of `shared`."""
        pages = [
            list(shared.pages[g][: cached // group.page]) if shared else []
            for g, group in enumerate(self.limits.groups)
        ]
        return Text(
            slot=self.slots.pop(0),
            start=cached,
            upper=cached,
            base=[0] * len(pages),
            pages=pages,
            owned=[[] for _ in pages],
            unsent=[list(range(len(p))) for p in pages],
        )

    def close(self, text: Text) -> None:
        """The slot and the pages are free, and the next to be taken."""
        self.slots.insert(0, text.slot)
        for free, owned in zip(self.free, text.owned, strict=True):
            free[:0] = owned

    def row(self, text: Text, tokens: Sequence[int], **values: Any) -> Row:
        """A row that feeds tokens, with pages for them. values: fields of Row."""
        text.upper += len(tokens)
        for g, group in enumerate(self.limits.groups):
            while text.base[g] + len(text.pages[g]) * group.page < text.upper:
                page = self.free[g].pop(0)
                text.unsent[g].append(len(text.pages[g]))
                text.pages[g].append(page)
                text.owned[g].append(page)
        start, text.start = text.start, -1
        return Row(slot=text.slot, tokens=tokens, start=start, upper=text.upper, base=tuple(text.base), **values)

    def trim(self, text: Text, length: int) -> None:
        """Give back the pages that a window group no longer needs, now that `length` positions are certain."""
        for g, group in enumerate(self.limits.groups):
            while group.window and text.base[g] + group.page <= length - group.window + 1:
                page = text.pages[g].pop(0)
                text.base[g] += group.page
                text.unsent[g] = list(range(len(text.pages[g])))
                if page in text.owned[g]:
                    text.owned[g].remove(page)
                    self.free[g].insert(0, page)

    def step(self, rows: Sequence[Placed], copies: Sequence[tuple[int, int, int, int]] = ()) -> ScheduleStep:
        """The next step, with the page edits that its texts have not sent yet."""
        edits: list[list[tuple[int, int, int]]] = [[] for _ in self.limits.groups]
        for text, _ in rows:
            for g, unsent in enumerate(text.unsent):
                edits[g] += [(text.slot, i, text.pages[g][i]) for i in unsent]
                unsent.clear()
        self.number += 1
        return build(self.limits, self.number, [row for _, row in rows], edits, copies, self.taps)

    def enqueue(self, rows: Sequence[Placed], masks: U32 | None = None, **more: Any) -> Ticket:
        """forward and sample."""
        ticket = self.backend.forward(self.step(rows, **more))
        self.backend.sample(ticket, masks)
        return ticket

    def run(self, rows: Sequence[Placed], masks: U32 | None = None, **more: Any) -> StepResult:
        """forward, sample and collect."""
        return self.backend.collect(self.enqueue(rows, masks, **more))
