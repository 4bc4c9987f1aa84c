"""From chosen rows to a ScheduleStep: the only place that lays out the contract's arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from backends.api.limits import Limits
from backends.api.step import I32, TOKEN, PageTable, Sampling, ScheduleStep, StateTable, empty
from engine.cache.sequence import SequenceCache
from engine.sched.prefixes import Prefixes
from engine.sched.request import Row, Run

N = TypeVar("N", np.int32, np.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """A step and whose rows it holds. drafted: the rows in the order that they were planned in; stamp: Prefixes.stamp
    when they were put into theirs."""

    step: ScheduleStep
    rows: tuple[Row, ...]
    drafted: tuple[Row, ...] = ()
    stamp: int = 0


class Draft:
    """Step `number` being planned, and what is left of it: free rows, tokens, history, masks, bias, page-table edits.

    edits: (slot, index, page), for each cache group. copies: (group, shard, src, dst). fed: whether there is a chunk of
    what must be fed.
    """

    __slots__ = ("bias", "copies", "edits", "fed", "free", "history", "masks", "most", "number", "rows", "tokens")

    def __init__(self, limits: Limits, copies: list[tuple[int, int, int, int]], number: int) -> None:
        self.number, self.fed = number, False
        self.rows: list[Row] = []
        self.edits: list[list[tuple[int, int, int]]] = [[] for _ in limits.groups]
        self.copies = copies
        self.free, self.tokens, self.most = limits.max_rows, limits.max_tokens, limits.max_edits
        self.history, self.masks, self.bias = limits.max_history, limits.max_masks, limits.max_bias

    def history_fits(self, run: Run) -> bool:
        """Whether the history that seating this run sends fits."""
        return run.start < 0 or not run.request.params.penalised or run.length <= self.history

    def bias_fits(self, run: Run) -> bool:
        """Whether the logit bias of a row that makes tokens fits."""
        return len(run.request.params.logit_bias) <= self.bias

    def edits_fit(self, cache: SequenceCache) -> bool:
        """Whether what the device must be told of a run's pages fits."""
        return cache.told or all(
            len(new) + len(edits) <= self.most for new, edits in zip(cache.edits, self.edits, strict=True)
        )

    def add(self, row: Row, cache: SequenceCache) -> None:
        """Put a row in. The device will know the pages of its run."""
        self.rows.append(row)
        self.free -= 1
        self.tokens -= len(row.tokens)
        self.history -= len(row.history)
        self.masks -= row.masked
        if row.makes:
            self.bias -= len(row.run.request.params.logit_bias)
        if not cache.told:
            for edits, new in zip(self.edits, cache.edits, strict=True):
                edits += [(row.run.slot, index, page) for index, page in new]
        cache.sent()


def build(draft: Draft, limits: Limits, prefixes: Prefixes, last: Plan | None) -> Plan:
    """Lay out a step.

    last: the step before. While the same runs decode and none comes or goes, their rows are the same objects
    (Run.row), and all but lengths, pages and copies is what it was.
    """
    number, edits, cut = draft.number, draft.edits, _ints(draft.copies).reshape(-1, 4)
    drafted, stamp = tuple(draft.rows), prefixes.stamp
    if last is not None and last.drafted == drafted and last.stamp == stamp:
        upper = last.step.upper + np.int32(1)
        tables = tuple(
            table if isinstance(table, StateTable) else _table(g, last.rows, edits, limits)
            for g, table in enumerate(last.step.tables)
        )
        step = replace(last.step, step=number, upper=upper, tables=tables, copies=cut)
        return Plan(step=step, rows=last.rows, drafted=drafted, stamp=stamp)
    rows, shared = prefixes.arrange(draft.rows)
    runs = [row.run for row in rows]
    step = ScheduleStep(
        step=number,
        slots=_ints([run.slot for run in runs]),
        starts=_ints([row.start for row in rows]),
        lens=_ints([len(row.tokens) for row in rows]),
        upper=_ints([run.upper for run in runs]),
        drafts=_ints([row.drafts for row in rows]),
        tokens=_ints([t for row in rows for t in row.tokens]),
        next=_ints([row.following for row in rows]),
        output=np.array([TOKEN if row.makes else 0 for row in rows], np.uint8),
        masked=np.array([row.masked for row in rows], bool),
        adapters=empty(len(rows)),
        tables=tuple(_table(g, rows, edits, limits) for g in range(len(limits.groups))),
        copies=cut,
        shared=shared,
        sampling=_sampling(runs, rows),
    )
    return Plan(step=step, rows=tuple(rows), drafted=drafted, stamp=stamp)


def _ints(values: Sequence[Any]) -> I32:
    return np.array(values, np.int32)


def _renumber(entries: NDArray[N], keep: Sequence[int]) -> NDArray[N]:
    """(row, ...) entries of the rows that are kept, with their new numbers."""
    moved = {old: new for new, old in enumerate(keep)}
    return np.array([(moved[r], *rest) for r, *rest in entries.tolist() if r in moved], entries.dtype).reshape(-1, 3)


def _table(
    g: int, rows: Sequence[Row], edits: Sequence[Sequence[tuple[int, int, int]]], limits: Limits
) -> PageTable | StateTable:
    kind = limits.groups[g].kind
    if kind == "state":
        return StateTable(
            read=_ints([row.read[g] for row in rows]),
            write=_ints([row.run.cache.write[g] for row in rows if row.run.cache is not None]),
        )
    return PageTable(
        edits=_ints(edits[g]).reshape(-1, 3),
        base=empty(len(rows))
        if kind == "full"
        else _ints([row.run.cache.base[g] for row in rows if row.run.cache is not None]),
    )


def _sampling(runs: Sequence[Run], rows: Sequence[Row]) -> Sampling:
    p = [run.request.params for run in runs]
    of = list(zip(rows, p, strict=True))
    bias = [(i, *pair) for i, (row, x) in enumerate(of) if row.makes for pair in x.logit_bias]
    history = [(i, token, made) for i, row in enumerate(rows) for token, made in row.history]
    return Sampling(
        temperature=np.array([x.temperature for x in p], np.float32),
        top_k=np.array([max(0, x.top_k) for x in p], np.int32),
        top_p=np.array([x.top_p for x in p], np.float32),
        min_p=np.array([x.min_p for x in p], np.float32),
        seed=np.array([run.request.seed for run in runs], np.uint64),
        penalty=np.array([(x.repetition_penalty, x.presence_penalty, x.frequency_penalty) for x in p], np.float32),
        logprobs=_ints([x.logprobs if row.makes and x.logprobs is not None else -1 for row, x in of]),
        prompt_logprobs=_ints([(row.score, x.prompt_logprobs) if row.score >= 0 else (-1, -1) for row, x in of]),
        bias=np.array(bias, np.float32).reshape(-1, 3),
        history=np.array(history, np.int32).reshape(-1, 3),
    )


def without(plan: Plan, bad: Sequence[int]) -> Plan | None:
    """The same step without the rows at `bad`; None when nothing is left. Page edits stay: they belong to slots. It
    tells of no shared prefixes."""
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
