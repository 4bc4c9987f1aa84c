"""A ScheduleStep as device tensors: rows put in an order that batches well, one host buffer, one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from backends.api.limits import Limits
from backends.api.seats import Asks, Scored
from backends.api.step import TOKEN, PageTable, Sampling, ScheduleStep
from backends.torch import branches
from backends.torch.branches import Branches, Layout
from backends.torch.buckets import Shape, parts
from backends.torch.choosing import Wishes, lay_out, read, send
from kernels_cuda import cascade

I64: TypeAlias = NDArray[np.int64]
ONE = np.float64(1).view(np.int64)
SLACK = 128
"""Positions of padding that cost less than another call."""


class Now:
    """What is told of a padded step whenever it is replayed, to what runs between its pieces. turn: how often it was;
    bunches: its rows, of one token each, and how far they reach; at first none does."""

    def __init__(self, rows: int, groups: int) -> None:
        self.turn, self.bunches = 0, (_idle(0, rows, groups),)

    def tell(self, step: ScheduleStep, limits: Limits, order: Order, padded: int) -> None:
        """The step that is about to be replayed, of rows in order, and as many more as make `padded`."""
        self.turn += 1
        rows, count = order.rows, len(order.rows)
        self.bunches = _bunch([1] * count, step.upper[rows].tolist(), _reaches(step, limits, rows))
        if count < padded:
            self.bunches += (_idle(count, padded, len(limits.groups)),)


class Bunch(NamedTuple):
    """Rows that are attended together: the same number of queries, reaches of a size. Slices of the ordered step.

    reach: for each cache group, entries of the table to read: it covers every position of these rows.
    """

    rows: slice
    tokens: slice
    queries: int
    reach: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """How a step is ordered for the device. rows, tokens: place there -> index in the step. chosen: places of the rows
    that return a token. literal: no token is taken from the device. fresh: nothing is cached of any row. span: for each
    cache group, all positions that the step reads lie in first .. last - 1. padded: rows that a padded step has on the
    device, all of which return a token; 0 = nothing is padded."""

    rows: I64
    tokens: I64
    bunches: tuple[Bunch, ...]
    chosen: I64
    literal: bool
    fresh: bool
    span: tuple[tuple[int, int], ...]
    padded: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """The rows, among the chosen, that are sampled with noise: device tensors with one entry a row, and host facts.

    at: index among the chosen. seed int64[N, 2]: high and low word. The rest float64, but top_k int64 (V = off).
    widest: the largest top_k that is on, 0 = none, -1 = not known. nucleus, floor: any row has a top_p, a min_p.
    every: these are all rows in order, also those that are greedy, whose temperature is 0.
    """

    at: torch.Tensor
    seed: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    widest: int
    nucleus: bool
    floor: bool
    every: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A step on the device; int64, rows R and tokens T in `order`.

    slots, starts, lens [R]; first [R+1]: of each row's tokens; tokens, row, offset [T]: token, its row, its place in
    it. base [R] and edits (flat entry, page) for each group. ends [O]: last token of each chosen row; chosen [O]: its
    row; into [O]: the slot whose last token is made. draws: None = all are greedy. wishes: None = no row asks for more.
    shape: of a padded step, whose tokens of padding have offset -1; None = nothing is padded. branches: rows that read
    pages together. now: of a padded step that has pieces.
    """

    order: Order
    slots: torch.Tensor
    starts: torch.Tensor
    lens: torch.Tensor
    first: torch.Tensor
    tokens: torch.Tensor
    row: torch.Tensor
    offset: torch.Tensor
    ends: torch.Tensor
    chosen: torch.Tensor
    into: torch.Tensor
    base: tuple[torch.Tensor, ...]
    edits: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    draws: Draws | None
    wishes: Wishes | None
    shape: Shape | None = None
    branches: Branches | None = None
    now: Now | None = None


def arrange(step: ScheduleStep, limits: Limits, together: bool = False) -> Order:
    """Order rows by length fed, then by reach, so that rows that batch well stand side by side; together: instead, as
    they stand in the step."""
    lens, upper = step.lens, step.upper
    rows = np.argsort(lens, kind="stable") if together else np.lexsort((upper, lens))
    n, ends = lens[rows], np.cumsum(lens)
    offset = np.repeat((ends - lens)[rows] - (np.cumsum(n) - n), n)
    bases = _bases(step, rows)
    return Order(
        rows=rows,
        tokens=offset + np.arange(len(offset)),
        bunches=_bunch(n.tolist(), upper[rows].tolist(), _reaches(step, limits, rows)),
        chosen=np.flatnonzero(step.output[rows] & TOKEN),
        literal=bool((step.tokens >= 0).all()),
        fresh=bool((step.starts == 0).all()),
        span=tuple((int(np.min(base)), int(upper.max())) for base in bases),
    )


def _idle(low: int, high: int, groups: int) -> Bunch:
    """Rows of padding."""
    return Bunch(slice(low, high), slice(low, high), 1, (1,) * groups)


def _bases(step: ScheduleStep, rows: I64) -> list[Any]:
    """Of each cache group, the positions that the tables of these rows begin at."""
    return [t.base[rows] if isinstance(t, PageTable) else 0 for t in step.tables]


def _reaches(step: ScheduleStep, limits: Limits, rows: I64) -> list[NDArray[Any]]:
    """Of each cache group, the entries of its table that each of these rows needs."""
    return [
        np.minimum(-((base - step.upper[rows]) // group.page), width)
        for base, group, width in zip(_bases(step, rows), limits.groups, limits.max_row_pages, strict=True)
    ]


def _bunch(lens: list[int], upper: list[int], reaches: list[NDArray[Any]]) -> tuple[Bunch, ...]:
    """Cut ordered rows where the length fed changes, or where a longest row would make the others twice their size."""
    out, high, token = [], len(lens), sum(lens)
    while high:
        low, most, queries = high - 1, upper[high - 1], lens[high - 1]
        while low and lens[low - 1] == queries and upper[low - 1] >= min(most // 2, most - SLACK):
            low -= 1
        first = token - queries * (high - low)
        reach = tuple(int(r[low:high].max()) for r in reaches)
        out.append(Bunch(slice(low, high), slice(first, token), queries, reach))
        high, token = low, first
    return tuple(reversed(out))


def pack(
    step: ScheduleStep,
    limits: Limits,
    device: torch.device,
    asks: Asks | None = None,
    asked: Scored | None = None,
    layout: Layout | None = None,
) -> Batch:
    """Bring a step to the device: everything in one int64 buffer, floats as bits of float64. Doesn't wait. layout: of
    its groups of rows, which it has."""
    order = arrange(step, limits, layout is not None)
    rows, n = order.rows, step.lens[order.rows]
    ends = np.cumsum(n)
    slots = step.slots[rows]
    sent: list[Any] = [slots, step.starts[rows], n, np.concatenate([[0], ends]), step.tokens[order.tokens]]
    sent += [np.repeat(np.arange(len(n)), n), np.arange(len(order.tokens)) - np.repeat(ends - n, n)]
    sent += [(ends - 1)[order.chosen], order.chosen, slots[order.chosen]]
    for table, width in zip(step.tables, limits.max_row_pages, strict=True):
        assert isinstance(table, PageTable)
        sent += [table.base[rows], table.edits[:, 0].astype(np.int64) * width + table.edits[:, 1], table.edits[:, 2]]
    sampling, picked = step.sampling, rows[order.chosen]
    drawn = np.flatnonzero(sampling.temperature[picked] > 0)
    every = device.type == "cuda" and len(drawn) > 0  # whose kernel looks at each row
    if every:
        drawn = np.arange(len(picked))
    noisy = picked[drawn]
    if len(drawn):
        sent += [drawn, *_choices(sampling, noisy, limits.vocab)]
    more = lay_out(step, asks or Asks.of(step), picked, order.tokens, limits.vocab, asked) or []
    sent += more
    slots, starts, lens, first, tokens, row, offset, last, chosen, into, *rest = send(sent, device)
    groups, rest = rest[: 3 * len(step.tables)], rest[3 * len(step.tables) :]
    rest, wishes = rest[: len(rest) - len(more)], rest[len(rest) - len(more) :]
    return Batch(
        order=order,
        slots=slots,
        starts=starts,
        lens=lens,
        first=first,
        tokens=tokens,
        row=row,
        offset=offset,
        ends=last,
        chosen=chosen,
        into=into,
        base=tuple(groups[::3]),
        edits=tuple(zip(groups[1::3], groups[2::3], strict=True)),
        draws=_draws(rest, sampling, noisy, limits.vocab, every) if len(drawn) else None,
        wishes=read(wishes) if more else None,
        branches=None if layout is None else branches.send(step, layout, rows, device),
    )


def fill(
    step: ScheduleStep, limits: Limits, shape: Shape, buffer: I64, layout: Layout | None = None, pieces: bool = False
) -> tuple[Order, list[I64]]:
    """Write a step, padded to a shape, to a buffer; its order, and the edits that did not fit, [E, 2] of each group
    (flat entry, page), which go ahead of it.

    A row of padding has no tokens and a slot of its own, the last; a token of padding belongs to the last row that has
    any, or to the first row where none has, and stands at place -1 of it. All rows return a token; one that was not
    asked for goes to the last slot. pieces: rows that reach as far stand side by side.
    """
    at, _ = parts(shape)
    buffer.fill(0)
    part = {name: buffer[where] for name, where in at.items()}
    stay = shape.even and (not pieces or shape.branches is not None)
    rows = np.arange(len(step.lens)) if stay else np.lexsort((step.upper, step.lens))
    count, n, void = len(rows), step.lens[rows], limits.slots
    ends = np.cumsum(n)
    offset = np.repeat((np.cumsum(step.lens) - step.lens)[rows] - (ends - n), n)
    tokens = offset + np.arange(len(offset))
    asked = (step.output[rows] & TOKEN) > 0
    slots = step.slots[rows]
    last = max(count - 1, 0)
    for name, value in (("slots", void), ("into", void), ("row", last), ("first", len(tokens)), ("offset", -1)):
        part[name][:] = value
    part["top_k"][:], part["top_p"][:] = limits.vocab, ONE
    part["slots"][:count], part["starts"][:count], part["lens"][:count] = slots, step.starts[rows], n
    part["ends"][:count], part["into"][:count] = ends - 1, np.where(asked, slots, void)
    part["first"][0], part["first"][1 : count + 1] = 0, ends
    part["tokens"][: len(tokens)], part["row"][: len(tokens)] = step.tokens[tokens], np.repeat(np.arange(count), n)
    part["offset"][: len(tokens)] = np.arange(len(tokens)) - np.repeat(ends - n, n)
    more = []
    for g, (table, width) in enumerate(zip(step.tables, limits.max_row_pages, strict=True)):
        assert isinstance(table, PageTable)
        part[f"base{g}"][:count] = table.base[rows]
        edits = np.stack([table.edits[:, 0].astype(np.int64) * width + table.edits[:, 1], table.edits[:, 2]], 1)
        room = shape.edits[g]
        fits = edits[max(0, len(edits) - room) :]  # edits of one entry keep their order
        part[f"entry{g}"][:] = void * width
        part[f"entry{g}"][: len(fits)], part[f"page{g}"][: len(fits)] = fits.T
        more.append(edits[: max(0, len(edits) - room)])
    if shape.branches is not None and layout is not None and len(step.shared):
        told = cascade.pad(branches.tell(step, layout, rows, shape.branches), shape.branches)
        for name, value in zip(("tiles", "covered", "used"), told, strict=True):
            part[name][:] = value.ravel()
    high, low, *rest = _choices(step.sampling, rows, limits.vocab)
    part["seed"][: 2 * count : 2], part["seed"][1 : 2 * count : 2] = high, low
    for name, value in zip(("top_k", "temperature", "top_p", "min_p"), rest, strict=True):
        part[name][:count] = value
    order = Order(
        rows=rows,
        tokens=tokens,
        bunches=(),
        chosen=np.flatnonzero(asked),
        literal=False,
        fresh=False,
        span=(),
        padded=shape.rows,
    )
    return order, more


def spread(buffer: torch.Tensor, limits: Limits, shape: Shape, numbers: torch.Tensor, pieces: bool = False) -> Batch:
    """The padded step in a device buffer, all of it views: whatever stands there when it is read. numbers
    int64[R]: 0, 1, 2, ... pieces: it is captured in pieces."""
    at, _ = parts(shape)
    part = {name: buffer[where] for name, where in at.items()}
    rows, groups = numbers[: shape.rows], range(len(limits.groups))
    every = np.arange(shape.rows)
    bunch = Bunch(slice(0, shape.rows), slice(0, shape.tokens), shape.tokens // shape.rows, limits.max_row_pages)
    order = Order(
        rows=every, tokens=np.arange(shape.tokens), bunches=(bunch,), chosen=every, literal=False, fresh=False, span=()
    )
    draws = Draws(
        at=rows,
        seed=part["seed"].view(-1, 2),
        temperature=part["temperature"].view(torch.float64),
        top_k=part["top_k"],
        top_p=part["top_p"].view(torch.float64),
        min_p=part["min_p"].view(torch.float64),
        widest=-1,
        nucleus=True,
        floor=True,
        every=True,
    )
    return Batch(
        order=order,
        **{
            name: part[name] for name in ("slots", "starts", "lens", "first", "tokens", "row", "offset", "ends", "into")
        },
        chosen=rows,
        base=tuple(part[f"base{g}"] for g in groups),
        edits=tuple((part[f"entry{g}"], part[f"page{g}"]) for g in groups),
        draws=draws,
        wishes=None,
        shape=shape,
        branches=None
        if shape.branches is None
        else Branches(cascade.Tiles(part["tiles"].view(-1, 5), part["covered"], part["used"]), shape.branches),
        now=Now(shape.rows, len(limits.groups)) if pieces else None,
    )


def _choices(s: Sampling, rows: I64, vocab: int) -> list[NDArray[Any]]:
    """Seed words, top_k and the floats of the noisy rows, all as int64."""
    k = s.top_k[rows].astype(np.int64)
    floats = (s.temperature, s.top_p, s.min_p)
    seed = s.seed[rows]
    words = [(seed >> np.uint64(32)).astype(np.int64), (seed & np.uint64(0xFFFFFFFF)).astype(np.int64)]
    return [
        *words,
        np.where((k > 0) & (k < vocab), k, vocab),
        *(f[rows].astype(np.float64).view(np.int64) for f in floats),
    ]


def _draws(sent: Sequence[torch.Tensor], s: Sampling, rows: I64, vocab: int, every: bool) -> Draws:
    at, high, low, top_k, *floats = sent
    temperature, top_p, min_p = (f.view(torch.float64) for f in floats)
    k = s.top_k[rows]
    return Draws(
        at=at,
        seed=torch.stack([high, low], 1),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        widest=int(k[(k > 0) & (k < vocab)].max(initial=0)),
        nucleus=bool((s.top_p[rows] < 1).any()),
        floor=bool((s.min_p[rows] > 0).any()),
        every=every,
    )
