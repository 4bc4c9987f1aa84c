"""The shapes that steps are padded to. A ladder over tokens alone; everything else follows from the bucket."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from backends.api.limits import Limits
from backends.api.step import I32

SMALL = 32
"""Buckets up to this many tokens have tiles of one query: each token reads the cache for itself."""
TILE = 8
"""Queries of a tile in larger buckets; a row with one token has a tile too, most of it empty."""
HEAD = ("tokens", "tiles")
"""Counts at the head of the buffer: real tokens, tiles."""
ROWS = ("slot", "start", "length", "first", "output", "top_k", "seed_high", "seed_low", "temperature", "top_p", "min_p")
"""One line of the buffer each, [rows]; the last three hold the bits of a float32. start: -1 or the cached length;
length: tokens fed; first: index of the row's first token; output: bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a bucket of `tokens` holds: rows, tiles (queries of one row that attend together), edits of page tables.

    tile: queries in a tile.
    """

    tokens: int
    rows: int
    tile: int
    tiles: int
    edits: int
    groups: int

    def fields(self) -> dict[str, tuple[int, ...]]:
        """The parts of the packed buffer, in order. edits: (slot, column, page). tiles: (row, first token, count)."""
        return {
            "head": (len(HEAD),),
            "tokens": (self.tokens,),
            "row": (self.tokens,),
            "rows": (len(ROWS), self.rows),
            "base": (self.groups, self.rows),
            "edits": (self.edits, 3),
            "tiles": (self.tiles, 3),
        }

    @property
    def size(self) -> int:
        """Entries of the packed buffer."""
        return sum(prod(shape) for shape in self.fields().values())

    def part(self, buffer: I32, name: str) -> I32:
        """A view of one part of a packed buffer."""
        where, dims = _places(self)[name]
        return buffer[where].reshape(dims)

    def split(self, buffer: I32) -> dict[str, I32]:
        """Views of the parts of a packed buffer, on the host or on the device."""
        return {name: buffer[where].reshape(dims) for name, (where, dims) in _places(self).items()}


@lru_cache
def _places(shape: Shape) -> dict[str, tuple[slice, tuple[int, ...]]]:
    """Where each field of a buffer lies."""
    out, at = {}, 0
    for name, dims in shape.fields().items():
        out[name] = slice(at, at + prod(dims)), dims
        at += prod(dims)
    return out


def make_shape(tokens: int, limits: Limits) -> Shape:
    """The shape of the bucket of `tokens` tokens.

    edits: what the rows of a step can need when they go on: one page a row, and one for each page of tokens. Longer
    lists (a row seated on a long prefix) go ahead of the step through a program of their own.
    """
    rows, tile = min(tokens, limits.max_rows), 1 if tokens <= SMALL else TILE
    return Shape(
        tokens=tokens,
        rows=rows,
        tile=tile,
        # each row has at most one tile that is not full
        tiles=tokens if tile == 1 else rows + tokens // tile,
        edits=sum(rows + tokens // g.page for g in limits.groups),
        groups=len(limits.groups),
    )


def ladder(limits: Limits) -> tuple[int, ...]:
    """The buckets, rising; the last holds every step."""
    return tuple(sorted({b for b in limits.token_buckets if 0 < b < limits.max_tokens} | {limits.max_tokens}))


def pad_slot(limits: Limits) -> np.int32:
    """The slot that padding stands for."""
    return np.int32(limits.slots)
