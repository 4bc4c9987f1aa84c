"""A step as one packed int32 buffer, and the buffer as the arrays of the program. One transfer a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backends.api.limits import Limits
from backends.api.step import I32, PageTable, ScheduleStep
from backends.jax.buckets import HEAD, ROWS, Shape, pad_slot
from backends.jax.caches import columns

EDITS = 1024
"""Edits of page tables that the program ahead of a step takes at once."""

ALIGNED = 64
"""Bytes at whose multiples XLA's buffers begin."""


class Batch(NamedTuple):
    """The step on the device, padded to its bucket. T tokens, R rows, N tiles.

    tokens, row int32[T]; real bool[T]. Of each row [R]: slot, start, length, first, output, top_k int32; seed_high,
    seed_low uint32; temperature, top_p, min_p float32. base int32[G, R]. edits int32[E, 3]: (slot, column, page).
    tiles int32[N, 3]: (row, first token, count), the first tile_count of them. A padded row has length 0.
    """

    tokens: Any
    row: Any
    real: Any
    slot: Any
    start: Any
    length: Any
    first: Any
    output: Any
    top_k: Any
    seed_high: Any
    seed_low: Any
    temperature: Any
    top_p: Any
    min_p: Any
    base: Any
    edits: Any
    tiles: Any
    tile_count: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A step as the program takes it: buffer int32[shape.size], and the edits that go ahead of it, int32[EDITS, 3]
    each, where it has too many."""

    step: ScheduleStep
    shape: Shape
    chosen: bool
    buffer: I32
    ahead: list[I32]


def pack(
    step: ScheduleStep, shape: Shape, limits: Limits, *, chosen: bool = True, last: Packed | None = None
) -> Packed:
    """The step in one buffer. chosen: by the step itself; otherwise it only finds its best tokens, and another program
    chooses. last: a step before, which shares all but page tables with this one."""
    if last is not None and last.shape == shape and last.chosen == chosen:
        buffer = _room(shape.size)
        buffer[:] = last.buffer
    else:
        buffer = _lay(step, shape, limits, chosen)
    rows, count, ahead = len(step.slots), 0, list[I32]()
    base, place = shape.part(buffer, "base"), shape.part(buffer, "edits")
    place[:] = pad_slot(limits), 0, 0
    for g, (table, column) in enumerate(zip(step.tables, columns(limits), strict=True)):
        assert isinstance(table, PageTable)
        base[g, :rows] = table.base
        edits = table.edits + np.array([0, column, 0], np.int32) if column else table.edits
        most = shape.edits - count
        place[count : count + len(edits)] = edits[:most]
        count = min(count + len(edits), shape.edits)
        ahead += _ahead(edits[most:], limits)
    return Packed(step=step, shape=shape, chosen=chosen, buffer=buffer, ahead=ahead)


def _room(size: int) -> I32:
    """int32[size], at an address that a CPU's devices take as it is, without a copy each."""
    raw = np.empty(4 * size + ALIGNED, np.uint8)
    skip = -raw.__array_interface__["data"][0] % ALIGNED
    return raw[skip : skip + 4 * size].view(np.int32)


def _lay(step: ScheduleStep, shape: Shape, limits: Limits, chosen: bool) -> I32:
    """The buffer without page tables."""
    buffer = _room(shape.size)
    buffer.fill(0)
    at, rows, s = shape.split(buffer), len(step.slots), step.sampling
    first = np.cumsum(step.lens, dtype=np.int32) - step.lens
    at["tokens"][: len(step.tokens)] = step.tokens
    at["row"][: len(step.tokens)] = np.repeat(np.arange(rows, dtype=np.int32), step.lens)
    line = dict(zip(ROWS, at["rows"], strict=True))
    line["slot"][rows:] = pad_slot(limits)
    for name, value in {
        "slot": step.slots,
        "start": step.starts,
        "length": step.lens,
        "first": first,
        "output": step.output,
        "top_k": s.top_k,
        "seed_high": (s.seed >> np.uint64(32)).astype(np.uint32).view(np.int32),
        "seed_low": s.seed.astype(np.uint32).view(np.int32),
        "temperature": s.temperature.view(np.int32) if chosen else 0,
        "top_p": s.top_p.view(np.int32),
        "min_p": s.min_p.view(np.int32),
    }.items():
        line[name][:rows] = value
    tiles = plan_tiles(step.lens, first, shape.tile)
    at["tiles"][: len(tiles)] = tiles
    at["head"][:] = [{"tokens": len(step.tokens), "tiles": len(tiles)}[name] for name in HEAD]
    return buffer


def _ahead(edits: I32, limits: Limits) -> list[I32]:
    """Edits ahead of a step, int32[EDITS, 3] each. Padding writes to the slot of padding."""
    out = []
    for i in range(0, len(edits), EDITS):
        part = np.empty((EDITS, 3), np.int32)
        part[:] = pad_slot(limits), 0, 0
        part[: len(edits) - i] = edits[i : i + EDITS]
        out.append(part)
    return out


def pack_copies(step: ScheduleStep, limits: Limits) -> I32:
    """int32[1 + max_copies, 3], as backends.jax.caches.lower_copy has it."""
    out = np.zeros((1 + limits.max_copies, 3), np.int32)
    out[0, 0], out[1 : 1 + len(step.copies)] = len(step.copies), step.copies[:, [0, 2, 3]]
    return out


def plan_tiles(lens: I32, first: I32, tile: int) -> I32:
    """Rows cut into tiles of one row each: int32[N, 3], (row, first token, count)."""
    counts = -(-lens // tile)
    row = np.repeat(np.arange(len(lens)), counts)
    begin = (np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)) * tile
    return np.stack([row, first[row] + begin, np.minimum(tile, lens[row] - begin)], axis=1).astype(np.int32)


def unpack(buffer: jax.Array, shape: Shape) -> Batch:
    """The packed buffer as arrays, inside the program."""
    at = shape.split(buffer)  # type: ignore[arg-type]
    head = dict(zip(HEAD, at["head"], strict=True))
    line: dict[str, Any] = dict(zip(ROWS, at["rows"], strict=True))
    for name in ("seed_high", "seed_low"):
        line[name] = jax.lax.bitcast_convert_type(line[name], jnp.uint32)
    for name in ("temperature", "top_p", "min_p"):
        line[name] = jax.lax.bitcast_convert_type(line[name], jnp.float32)
    return Batch(
        tokens=at["tokens"],
        row=at["row"],
        real=jnp.arange(shape.tokens) < head["tokens"],
        base=at["base"],
        edits=at["edits"],
        tiles=at["tiles"],
        tile_count=head["tiles"],
        **line,
    )
