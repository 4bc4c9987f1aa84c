"""What a padded step begins with: page tables edited, lengths moved on, and for each token where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels_cuda.overlap import options, ready, wait

Array = torch.Tensor
BLOCK: tl.constexpr = tl.constexpr(256)


class Step(NamedTuple):
    """A step's inputs on the device, int64: of rows slots, starts (-1: at the slot's own length), lens; first [R+1];
    of tokens their ids (-1: the slot's last), rows, and places in them (-1: padding)."""

    slots: Array
    starts: Array
    lens: Array
    first: Array
    tokens: Array
    row: Array
    offset: Array


class Group(NamedTuple):
    """A cache group. table int64[slots, W]; base int64[R]: position of entry 0 of a row's table; entry, page int64[E]:
    edits of the table, made first; size: tokens of a page."""

    table: Array
    base: Array
    entry: Array
    page: Array
    size: int


class Seen(NamedTuple):
    """A cache group as the rows of a step see it: int32 first, start, base and table [R, W], as
    `kernels_cuda.attention.Rows` has them; write int64[T]: the entry of each new key, -1 of padding."""

    first: Array
    start: Array
    base: Array
    table: Array
    write: Array


class Begun(NamedTuple):
    """int64: lengths of rows before and after the step; positions and ids of tokens; and each group."""

    before: Array
    after: Array
    positions: Array
    tokens: Array
    seen: tuple[Seen, ...]


def begin(step: Step, groups: Sequence[Group], length: Array, last: Array) -> Begun:
    """Edit the tables, move the lengths [slots] of the rows on, and tell the rest. last [slots]: a slot's last token.

    Padding rows may share a slot: they are seated at one length.
    """
    rows, tokens = len(step.slots), len(step.tokens)
    before, after = (torch.empty_like(step.slots) for _ in range(2))
    positions, ids = (torch.empty_like(step.tokens) for _ in range(2))
    told, seen = options(length), []
    for g, group in enumerate(groups):
        width, fresh = group.table.shape[1], torch.empty(3 * rows + 1, dtype=torch.int32, device=length.device)
        first, start, base = fresh.split([rows + 1, rows, rows])
        made = Seen(first, start, base, fresh.new_empty((rows, width)), torch.empty_like(step.tokens))
        _seat[(1,)](
            step.slots, step.starts, step.lens, length, before, after, group.entry, group.page, group.table,
            rows, len(group.entry), FIRST=g == 0, num_warps=8, **told,
        )  # fmt: skip
        across = triton.cdiv(width, 4 * BLOCK.value)
        _look[(triton.cdiv(tokens, BLOCK.value) + rows * across,)](
            *step, last, before, group.table, group.base, positions, ids, *made,
            rows, tokens, across, width=width, PAGE=group.size, FIRST=g == 0, num_warps=4, **told,
        )  # fmt: skip
        seen.append(made)
    return Begun(before, after, positions, ids, tuple(seen))


def plain(step: Step, groups: Sequence[Group], length: Array, last: Array) -> Begun:
    """What `begin` does, in torch."""
    for group in groups:
        group.table.view(-1)[group.entry] = group.page
    before = torch.where(step.starts >= 0, step.starts, length[step.slots])
    after = before + step.lens
    length[step.slots] = after
    positions = before[step.row] + step.offset
    tokens = torch.where(step.tokens >= 0, step.tokens, last[step.slots[step.row]])
    seen = []
    for group in groups:
        at, table = positions - group.base[step.row], group.table[step.slots]
        page = table[step.row, (at // group.size).clamp(0, table.shape[1] - 1)]
        write = torch.where(step.offset >= 0, page * group.size + at % group.size, -1)
        seen.append(Seen(step.first.int(), before.int(), group.base.int(), table.int(), write))
    return Begun(before, after, positions, tokens, tuple(seen))


@triton.jit(do_not_specialize=["rows", "edits"], do_not_specialize_on_alignment=[
    "slots", "starts", "lens", "length", "before", "after", "entry", "page", "table",
])  # fmt: skip
def _seat(
    slots, starts, lens, length, before, after, entry, page, table, rows, edits,
    FIRST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: edits of a table; of the first group lengths too."""
    ready(OVERLAP)
    wait(OVERLAP)
    i = tl.arange(0, BLOCK)
    for low in range(0, edits, BLOCK):
        inside = low + i < edits
        to = table + tl.load(entry + low + i, mask=inside, other=0)
        tl.store(to, tl.load(page + low + i, mask=inside, other=0), mask=inside)
    if FIRST:
        for low in range(0, rows, BLOCK):
            r = low + i
            inside = r < rows
            slot, start = tl.load(slots + r, mask=inside, other=0), tl.load(starts + r, mask=inside, other=0)
            old = tl.where(start >= 0, start, tl.load(length + slot, mask=inside, other=0))
            new = old + tl.load(lens + r, mask=inside, other=0)
            tl.store(before + r, old, mask=inside)
            tl.store(after + r, new, mask=inside)
            tl.store(length + slot, new, mask=inside)


@triton.jit(do_not_specialize=["rows", "tokens_", "across"], do_not_specialize_on_alignment=[
    "slots", "starts", "lens", "first", "tokens", "row", "offset", "last", "before", "table", "base", "positions",
    "ids", "first32", "start32", "base32", "table32", "write",
])  # fmt: skip
def _look(
    slots, starts, lens, first, tokens, row, offset, last, before, table, base, positions, ids,
    first32, start32, base32, table32, write, rows, tokens_, across,
    width: tl.constexpr, PAGE: tl.constexpr, FIRST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK tokens, or a part of a row's table; the first such part tells of the row too."""
    ready(OVERLAP)
    wait(OVERLAP)
    turn = tl.program_id(0) - tl.cdiv(tokens_, BLOCK)
    if turn < 0:
        t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = t < tokens_
        r, place = tl.load(row + t, mask=inside, other=0), tl.load(offset + t, mask=inside, other=0)
        slot, position = tl.load(slots + r, mask=inside, other=0), tl.load(before + r, mask=inside, other=0) + place
        if FIRST:
            token = tl.load(tokens + t, mask=inside, other=0)
            token = tl.where(token >= 0, token, tl.load(last + slot, mask=inside, other=0))
            tl.store(ids + t, token, mask=inside)
            tl.store(positions + t, position, mask=inside)
        at = tl.maximum(position - tl.load(base + r, mask=inside, other=0), 0)
        page = tl.load(table + slot * width + tl.minimum(at // PAGE, width - 1), mask=inside, other=0)
        tl.store(write + t, tl.where(place >= 0, page * PAGE + at % PAGE, -1), mask=inside)
    else:
        line, part = turn // across, turn % across
        column = part * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
        from_ = table + tl.load(slots + line) * width
        to = table32 + line.to(tl.int64) * width + column
        tl.store(to, tl.load(from_ + column, mask=column < width, other=0).to(tl.int32), mask=column < width)
        if part == 0:
            tl.store(first32 + line, tl.load(first + line).to(tl.int32))
            tl.store(first32 + line + 1, tl.load(first + line + 1).to(tl.int32))
            tl.store(start32 + line, tl.load(before + line).to(tl.int32))
            tl.store(base32 + line, tl.load(base + line).to(tl.int32))
