"""What the kernel of attention is compiled for, and what it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, NamedTuple

from kernels_pallas.blocks import Blocks

LANES, SUBLANES = 128, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What is fixed when a call is compiled. head: head_dim; entries: of a row's page table; page: tokens; scaled: the
    cache holds numbers over their scales; tree: rows may feed guesses as trees."""

    q_heads: int
    kv_heads: int
    head: int
    page: int
    entries: int
    scale: float = 1.0
    window: int | None = None
    cap: float | None = None
    scaled: bool = False
    tree: bool = False
    blocks: Blocks | None = None

    @property
    def group(self) -> int:
        """Query heads of a key-value head."""
        return self.q_heads // self.kv_heads

    @property
    def fold(self) -> int:
        """Key-value heads of one product."""
        full = (f for f in range(1, self.kv_heads + 1) if not self.kv_heads % f and not f * self.group % SUBLANES)
        return next(full, self.kv_heads)

    @property
    def products(self) -> int:
        return self.kv_heads // self.fold

    @property
    def rows(self) -> int:
        """Of one query in one product, padded to whole registers."""
        return -(-self.fold * self.group // SUBLANES) * SUBLANES

    @property
    def most(self) -> int:
        """Queries of the largest tile."""
        return self.blocks.queries[-1]

    def large(self, size: int) -> bool:
        """Whether a tile of `size` queries goes through the pipeline of large tiles: the largest may."""
        return size == self.most and size >= self.blocks.large

    @property
    def unfolds(self) -> bool:
        """Whether a large tile asks one key-value head a product, though registers then hold several queries."""
        return self.fold > 1 and self.fold * self.group == SUBLANES and not self.most % self.fold

    @property
    def pieces(self) -> int:
        """Groups of heads of a large tile that are asked together."""
        return self.kv_heads if self.unfolds else self.products

    @property
    def many(self) -> int:
        """Rows of a product of a large tile."""
        return self.most * self.rows // (self.fold if self.unfolds else 1)

    @property
    def depth(self) -> int:
        """Of a product of a large tile."""
        return self.lanes * (1 if self.unfolds else self.fold)

    @property
    def step(self) -> int:
        """Keys of a product of a large tile."""
        return min(self.blocks.step, self.blocks.keys)

    @property
    def plain(self) -> bool:
        """Whether a large tile has turns without a mask. A short window cuts into whatever some query sees."""
        return self.blocks.plain and (not self.window or self.window >= self.step + self.most - 1)

    @property
    def ahead(self) -> int:
        """Products of a turn of the pipeline: places in it."""
        return gcd(self.blocks.ahead, self.pieces)

    @property
    def lanes(self) -> int:
        """Of one head's keys, widened to whole registers: a head of 64 takes its values' lanes along."""
        return -(-self.head // LANES) * LANES

    @property
    def line(self) -> int:
        """Numbers of one token in the cache."""
        return self.kv_heads * 2 * self.head


class Refs(NamedTuple):
    """What the kernel reads and writes. Of each row of a query, heads holds its sink and the scales of its keys and its
    values. Buffers of copies have two halves; done: semaphores of (queries, keys, output).

    query to score: of all tiles but large ones. fade: what a new peak makes of sums and outputs; sum: of each lane;
    seen: what to add to scores.

    asks to last: of large tiles. For each piece queries, peaks, sums and outputs; for each place of the pipeline
    scores, weights, values (two turns') and stats; and last, of each row its query in the tile, less the sublane. Rows
    are across in all of these but asks.

    Where rows may be trees, root, stands and bits are as attention.Tree has them, and node holds of each row of a small
    tile its two words of bits and its position; elsewhere they are None.
    """

    row: Any
    token: Any
    count: Any
    position: Any
    total: Any
    at: Any
    table: Any
    base: Any
    root: Any
    stands: Any
    bits: Any
    q: Any
    cache: Any
    heads: Any
    out: Any
    asked: Any
    keys: Any
    made: Any
    query: Any
    top: Any
    sum: Any
    acc: Any
    fade: Any
    seen: Any
    score: Any
    asks: Any
    tops: Any
    sums: Any
    outs: Any
    scores: Any
    weights: Any
    values: Any
    stats: Any
    last: Any
    node: Any
    done: Any

    @classmethod
    def of(cls, form: Form, refs: tuple[Any, ...]) -> Refs:
        """From those of a call, in order."""
        names = [name for name in cls._fields if form.tree or name not in ("root", "stands", "bits", "node")]
        return cls(**dict.fromkeys(cls._fields) | dict(zip(names, refs, strict=True)))
