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
from backends.torch.choosing import Wishes, lay_out, read

I64: TypeAlias = NDArray[np.int64]
SLACK = 128
"""Positions of padding that cost less than another call."""


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
    cache group, all positions that the step reads lie in first .. last - 1."""

    rows: I64
    tokens: I64
    bunches: tuple[Bunch, ...]
    chosen: I64
    literal: bool
    fresh: bool
    span: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """The rows, among the chosen, that are sampled with noise: device tensors with one entry a row, and host facts.

    at: index among the chosen. seed int64[N, 2]: high and low word. The rest float64, but top_k int64 (V = off).
    widest: the largest top_k that is on, 0 = none. nucleus, floor: any row has a top_p, a min_p.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A step on the device; int64, rows R and tokens T in `order`.

    slots, starts, lens [R]; tokens, row, offset [T]: token, its row, its place in it. base [R] and edits (flat entry,
    page) for each group. ends [O]: last token of each chosen row; chosen [O]: its row. draws: None = all are greedy.
    wishes: None = no row asks for more.
    """

    order: Order
    slots: torch.Tensor
    starts: torch.Tensor
    lens: torch.Tensor
    tokens: torch.Tensor
    row: torch.Tensor
    offset: torch.Tensor
    ends: torch.Tensor
    chosen: torch.Tensor
    base: tuple[torch.Tensor, ...]
    edits: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    draws: Draws | None
    wishes: Wishes | None


def arrange(step: ScheduleStep, limits: Limits) -> Order:
    """Order rows by length fed, then by reach, so that rows that batch well stand side by side."""
    lens, upper = step.lens, step.upper
    rows = np.lexsort((upper, lens))
    n, ends = lens[rows], np.cumsum(lens)
    offset = np.repeat((ends - lens)[rows] - (np.cumsum(n) - n), n)
    bases = [t.base[rows] if isinstance(t, PageTable) else 0 for t in step.tables]
    reaches = [
        np.minimum(-((base - upper[rows]) // group.page), width)
        for base, group, width in zip(bases, limits.groups, limits.max_row_pages, strict=True)
    ]
    return Order(
        rows=rows,
        tokens=offset + np.arange(len(offset)),
        bunches=_bunch(n.tolist(), upper[rows].tolist(), reaches),
        chosen=np.flatnonzero(step.output[rows] & TOKEN),
        literal=bool((step.tokens >= 0).all()),
        fresh=bool((step.starts == 0).all()),
        span=tuple((int(np.min(base)), int(upper.max())) for base in bases),
    )


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
    step: ScheduleStep, limits: Limits, device: torch.device, asks: Asks | None = None, asked: Scored | None = None
) -> Batch:
    """Bring a step to the device: everything in one int64 buffer, floats as bits of float64. Doesn't wait."""
    order = arrange(step, limits)
    rows, n = order.rows, step.lens[order.rows]
    ends = np.cumsum(n)
    parts: list[Any] = [step.slots[rows], step.starts[rows], n, step.tokens[order.tokens]]
    parts += [np.repeat(np.arange(len(n)), n), np.arange(len(order.tokens)) - np.repeat(ends - n, n)]
    parts += [(ends - 1)[order.chosen], order.chosen]
    for table, width in zip(step.tables, limits.max_row_pages, strict=True):
        assert isinstance(table, PageTable)
        parts += [table.base[rows], table.edits[:, 0].astype(np.int64) * width + table.edits[:, 1], table.edits[:, 2]]
    sampling, picked = step.sampling, rows[order.chosen]
    drawn = np.flatnonzero(sampling.temperature[picked] > 0)
    noisy = picked[drawn]
    if len(drawn):
        parts += [drawn, *_choices(sampling, noisy, limits.vocab)]
    more = lay_out(step, asks or Asks.of(step), picked, order.tokens, limits.vocab, asked) or []
    parts += more
    slots, starts, lens, tokens, row, offset, last, chosen, *rest = _send(parts, device)
    groups, rest = rest[: 3 * len(step.tables)], rest[3 * len(step.tables) :]
    rest, wishes = rest[: len(rest) - len(more)], rest[len(rest) - len(more) :]
    return Batch(
        order=order,
        slots=slots,
        starts=starts,
        lens=lens,
        tokens=tokens,
        row=row,
        offset=offset,
        ends=last,
        chosen=chosen,
        base=tuple(groups[::3]),
        edits=tuple(zip(groups[1::3], groups[2::3], strict=True)),
        draws=_draws(rest, sampling, noisy, limits.vocab) if len(drawn) else None,
        wishes=read(wishes) if more else None,
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


def _draws(sent: Sequence[torch.Tensor], s: Sampling, rows: I64, vocab: int) -> Draws:
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
    )


def _send(parts: Sequence[NDArray[Any]], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Integer arrays as int64 views of one device buffer. torch keeps pinned memory until it is copied."""
    sizes = [len(p) for p in parts]
    host = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate(parts, out=host.numpy(), casting="same_kind")
    return host.to(device, non_blocking=True).split(sizes)
