"""The paged cache of the reference: memory that starts dirty, the slots' page tables, and attention over both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes  # and "bfloat16" is a dtype that numpy knows
import numpy as np
from numpy.typing import NDArray

from backends.api.limits import Limits
from backends.api.step import I32, PageTable, ScheduleStep
from backends.reference.model import attend
from engine.errors import StepRefused
from engine.model.groups import CacheGroup, Place
from engine.model.spec import Attention

UNSET = -1
HELD: dict[str, tuple[Any, float]] = {"int8": (np.int8, 127.0), "fp8": (ml_dtypes.float8_e4m3fn, 448.0)}
"""Caches of 8 bits: the type of a number, and the largest."""


def narrow(x: NDArray[Any], inverses: NDArray[Any], dtype: str) -> NDArray[Any]:
    """x [..., kv_heads, d] as a cache of 8 bits holds it: times the inverses [kv_heads] of its scales, in float32,
    clamped, rounded to the nearest, ties to even. NaN stays what it is in fp8, and becomes 0 in int8, which has none.
    """
    kind, most = HELD[dtype]
    ratio = np.clip(np.asarray(x, np.float32) * np.asarray(inverses, np.float32)[:, None], -most, most)
    return np.rint(np.nan_to_num(ratio, nan=0.0)).astype(kind) if dtype == "int8" else ratio.astype(kind)


def widen(held: NDArray[Any], scales: NDArray[Any]) -> NDArray[Any]:
    """The numbers that a cache of 8 bits stands for, in the dtype of the scales [kv_heads]."""
    return held.astype(scales.dtype) * scales[:, None]


class Row(NamedTuple):
    """One row of a step: where its tokens stand among those fed, its slot, its cached length."""

    at: slice
    slot: int
    start: int

    @property
    def end(self) -> int:
        """Its length afterwards, guesses included."""
        return self.start + int(self.at.stop - self.at.start)


class Cells(NamedTuple):
    """Where one row's keys lie in one group: page * page_size + offset. new: of the tokens fed; seen: from `first`."""

    new: NDArray[np.intp]
    seen: NDArray[np.intp]
    first: int


class Paged:
    """Keys and values of one cache group: [layers, 2, pages * page, kv_heads, head_dim], NaN until written (int8: -128,
    which is never written)."""

    def __init__(self, group: CacheGroup, pages: int, width: int, slots: int, dtype: str) -> None:
        self.group = group
        shape = (len(group.layers), 2, pages * group.page, group.kv_heads, group.head_dim)
        self.dtype = dtype
        self.memory = np.full(shape, -128 if dtype == "int8" else np.nan, HELD[dtype][0] if dtype in HELD else dtype)
        self.table = np.full((slots, width), UNSET, np.int32)

    def edited(self, edits: I32, seated: I32) -> I32:
        """The tables after a step's edits. A slot that is seated forgets its entries: leaning on one is refused."""
        table = self.table.copy()
        table[seated] = UNSET
        table[edits[:, 0], edits[:, 1]] = edits[:, 2]
        return table

    def cells(self, table: I32, base: int, row: Row) -> Cells:
        """Raises StepRefused where a position has no page."""
        first = max(0, row.start - self.group.window + 1) if self.group.window else 0
        at, page = np.arange(first, row.end) - base, self.group.page
        inside = at[0] >= 0 and at[-1] // page < table.shape[1]
        pages = table[row.slot, at // page] if inside else np.array([UNSET])
        if (pages == UNSET).any():
            raise StepRefused(f"tables: slot {row.slot} lacks a page of {first} .. {row.end - 1}", field="tables")
        seen = pages.astype(np.intp) * page + at % page
        return Cells(seen[row.start - first :], seen, first)

    def copy(self, source: int, target: int) -> None:
        """Page `source` to page `target`, in every layer."""
        pages = self.memory.reshape(*self.memory.shape[:2], -1, self.group.page, *self.memory.shape[3:])
        pages[:, :, target] = pages[:, :, source]


class Caches:
    """The caches of every group."""

    def __init__(self, limits: Limits, dtype: str) -> None:
        sizes = zip(limits.groups, limits.pages, limits.max_row_pages, strict=True)
        self.groups = [Paged(group, pages, width, limits.slots, dtype) for group, pages, width in sizes]

    def prepare(self, step: ScheduleStep, rows: Sequence[Row]) -> list[list[Cells]]:
        """Set page tables, do the copies in order. Returns the cells of each row in each group.

        Raises StepRefused before anything is changed.
        """
        seated, found, tables = step.slots[step.starts >= 0], [], []
        for paged, given in zip(self.groups, step.tables, strict=True):
            assert isinstance(given, PageTable)  # no state groups here
            tables.append(paged.edited(given.edits, seated))
            found.append([paged.cells(tables[-1], int(given.base[r]), row) for r, row in enumerate(rows)])
            if paged.group.kind == "full":
                _check_shared(step.shared, rows, found[-1])
        for paged, table in zip(self.groups, tables, strict=True):
            paged.table = table
        for group, _, source, target in step.copies:
            self.groups[group].copy(source, target)
        return found

    def largest(self) -> list[NDArray[np.float32]]:
        """Of each group the largest magnitudes that its cache, which has not 8 bits, holds: float32[layers, 2,
        kv_heads]."""
        return [np.nanmax(np.abs(paged.memory), axis=(2, 4)).astype(np.float32) for paged in self.groups]

    def attend(
        self,
        place: Place,
        a: Attention,
        rows: Sequence[Row],
        cells: Sequence[Sequence[Cells]],
        q: Any,
        k: Any,
        v: Any,
        sinks: Any = None,
        scales: Any = None,
    ) -> Any:
        """Write k and v [T, kv_heads, d] of one layer, then attend with q [T, q_heads, d] -> [T, q_heads, d]. scales:
        of the layer's keys and values and their inverses, [2, kv_heads] each, where the cache has 8 bits."""
        self.write(place, rows, cells, k, v, scales)
        memory, out = self.groups[place.group].memory[place.rank], np.empty_like(q)
        for row, cell in zip(rows, cells[place.group], strict=True):
            keys, values = memory[:, cell.seen]
            if scales is None:
                keys, values = keys.astype(q.dtype), values.astype(q.dtype)
            else:
                keys, values = widen(keys, scales[0][0]), widen(values, scales[0][1])
            out[row.at] = attend(a, q[row.at], keys, values, row.start, cell.first, sinks)
        return out

    def write(
        self, place: Place, rows: Sequence[Row], cells: Sequence[Sequence[Cells]], k: Any, v: Any, scales: Any
    ) -> None:
        """The first half of `attend`."""
        paged = self.groups[place.group]
        memory = paged.memory[place.rank]
        if scales is not None:
            k, v = (narrow(x, one, paged.dtype) for x, one in zip((k, v), scales[1], strict=True))
        for row, cell in zip(rows, cells[place.group], strict=True):
            memory[0, cell.new], memory[1, cell.new] = k[row.at], v[row.at]


def _check_shared(shared: I32, rows: Sequence[Row], cells: Sequence[Cells]) -> None:
    """Raises StepRefused where rows that are said to read the same cells do not, or before these are written."""
    for first, last, begin, end in shared.tolist():
        for r in range(first, last + 1):
            same = np.array_equal(cells[r].seen[begin : end + 1], cells[first].seen[begin : end + 1])
            if end >= rows[r].start or not same:
                raise StepRefused(f"shared: row {r} reads other pages than row {first}", rows=[r], field="shared")
