"""From chosen rows to a ScheduleStep: the only place that lays out the contract's arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from backends.api.limits import Limits
from backends.api.step import I32, TOKEN, PageTable, Sampling, ScheduleStep, StateTable, empty
from engine.sched.request import Row

N = TypeVar("N", np.int32, np.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """A step and whose rows it holds."""

    step: ScheduleStep
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draft:
    """A row on its way into a step: what is fed and what the device must be told with it."""

    row: Row
    tokens: Sequence[int]
    start: int
    following: int
    edits: list[list[tuple[int, int]]]
    read: list[int]
    history: Sequence[tuple[int, bool]]


def build(number: int, drafts: Sequence[Draft], copies: Sequence[tuple[int, int, int, int]], limits: Limits) -> Plan:
    """Lay out a step. copies: (group, shard, src, dst)."""
    rows = [d.row for d in drafts]
    runs = [r.run for r in rows]
    step = ScheduleStep(
        step=number,
        slots=_ints([run.slot for run in runs]),
        starts=_ints([d.start for d in drafts]),
        lens=_ints([r.fed for r in rows]),
        upper=_ints([run.upper for run in runs]),
        drafts=_ints([r.drafts for r in rows]),
        tokens=_ints([t for d in drafts for t in d.tokens]),
        next=_ints([d.following for d in drafts]),
        output=np.array([TOKEN if r.makes else 0 for r in rows], np.uint8),
        masked=np.array([r.makes and r.run.masks is not None and r.run.masks.binds(r.made) for r in rows], bool),
        adapters=empty(len(rows)),
        tables=tuple(_table(g, drafts, limits) for g in range(len(limits.groups))),
        copies=_ints(copies).reshape(-1, 4),
        sampling=_sampling(rows, drafts),
    )
    return Plan(step=step, rows=tuple(rows))


def _ints(values: Sequence[Any]) -> I32:
    return np.array(values, np.int32)


def _renumber(entries: NDArray[N], keep: Sequence[int]) -> NDArray[N]:
    """(row, ...) entries of the rows that are kept, with their new numbers."""
    moved = {old: new for new, old in enumerate(keep)}
    return np.array([(moved[r], *rest) for r, *rest in entries.tolist() if r in moved], entries.dtype).reshape(-1, 3)


def _table(g: int, drafts: Sequence[Draft], limits: Limits) -> PageTable | StateTable:
    caches = [d.row.run.cache for d in drafts]
    if limits.groups[g].kind == "state":
        return StateTable(
            read=np.array([d.read[g] for d in drafts], np.int32),
            write=np.array([c.write[g] for c in caches if c is not None], np.int32),
        )
    edits = [(d.row.run.slot, index, page) for d in drafts for index, page in d.edits[g]]
    return PageTable(
        edits=np.array(edits, np.int32).reshape(-1, 3),
        base=np.array([c.base[g] for c in caches if c is not None], np.int32),
    )


def _sampling(rows: Sequence[Row], drafts: Sequence[Draft]) -> Sampling:
    runs = [row.run for row in rows]
    p = [run.request.params for run in runs]
    of = list(zip(rows, p, strict=True))
    history = [(i, token, made) for i, d in enumerate(drafts) for token, made in d.history]
    return Sampling(
        temperature=np.array([x.temperature for x in p], np.float32),
        top_k=np.array([max(0, x.top_k) for x in p], np.int32),
        top_p=np.array([x.top_p for x in p], np.float32),
        min_p=np.array([x.min_p for x in p], np.float32),
        seed=np.array([run.request.seed for run in runs], np.uint64),
        penalty=np.array([(x.repetition_penalty, x.presence_penalty, x.frequency_penalty) for x in p], np.float32),
        logprobs=_ints([x.logprobs if row.makes and x.logprobs is not None else -1 for row, x in of]),
        prompt_logprobs=_ints([(row.score, x.prompt_logprobs) if row.score >= 0 else (-1, -1) for row, x in of]),
        bias=np.array(
            [(i, *pair) for i, (row, x) in enumerate(of) if row.makes for pair in x.logit_bias], np.float32
        ).reshape(-1, 3),
        history=np.array(history, np.int32).reshape(-1, 3),
    )


def without(plan: Plan, bad: Sequence[int]) -> Plan | None:
    """The same step without the rows at `bad`; None when nothing is left. Page edits stay: they belong to slots."""
    keep = [i for i in range(len(plan.rows)) if i not in set(bad)]
    if not keep:
        return None
    s, at = plan.step, np.array(keep)
    cuts = np.cumsum(s.lens)[:-1]
    per_row = ("slots", "starts", "lens", "upper", "drafts", "next", "output", "masked", "adapters")
    by_row = ("temperature", "top_k", "top_p", "min_p", "seed", "penalty", "logprobs", "prompt_logprobs")
    step = ScheduleStep(
        step=s.step,
        tokens=np.concatenate([np.split(s.tokens, cuts)[i] for i in keep]),
        tables=tuple(
            PageTable(edits=t.edits, base=t.base[at])
            if isinstance(t, PageTable)
            else StateTable(read=t.read[at], write=t.write[at])
            for t in s.tables
        ),
        copies=s.copies,
        sampling=Sampling(
            **{f: getattr(s.sampling, f)[at] for f in by_row},
            bias=_renumber(s.sampling.bias, keep),
            history=_renumber(s.sampling.history, keep),
            label_ids=s.sampling.label_ids,
        ),
        taps=s.taps,
        **{f: getattr(s, f)[at] for f in per_row},
    )
    return Plan(step=step, rows=tuple(plan.rows[i] for i in keep))
