"""What deterministic mode does by itself: attention over fixed absolute blocks of the cache, a token at a time, and
choosing and scoring, a row at a time, since torch sums one row otherwise than several.

A block that a query sees nothing of adds nothing, exactly: so what a token gets depends on its own position alone, not
on how long the others of its tile are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from backends.api.limits import Limits
from backends.torch import choosing, sampler
from backends.torch.attend import write
from backends.torch.caches import Caches, take, widen
from backends.torch.choosing import Scores
from backends.torch.inputs import Batch, Draws
from engine.model.groups import Place
from engine.model.spec import Attention

Array = torch.Tensor
BLOCK = 128
"""Positions of the cache that are reduced at once."""
FAR = -1e30
"""Score of what a query does not see: finite, so that no difference of scores is NaN."""


class View(NamedTuple):
    """A cache group as a tile sees it. write int64[T]: entries that the new keys and values go to. blocks: of each,
    entries to read int64[T * BLOCK], and which positions each token sees, bool[T, 1, 1, BLOCK]."""

    write: Array
    blocks: tuple[tuple[Array, Array], ...]


def locate(batch: Batch, caches: Caches, positions: Array, limits: Limits) -> list[View]:
    """The cache groups as this tile sees them. positions int64[T]."""
    out = []
    for g, (group, width) in enumerate(zip(limits.groups, limits.max_row_pages, strict=True)):
        page, base = group.page, batch.base[g][batch.row]
        table = caches.tables[g].index_select(0, batch.slots)
        cells = table.view(-1)
        line = batch.row * width

        def entry(at: Array, line: Array = line, base: Array = base, cells: Array = cells, size: int = page) -> Array:
            """Entries of positions int64[T, ...]; of one that the table has not, some other."""
            more = (...,) + (None,) * (at.ndim - 1)
            place = at - base[more]
            index = line[more] + (place // size).clamp(0, len(cells) // len(batch.slots) - 1)
            return cells[index] * size + place % size

        void, query = caches.groups[g].shape[1] - 1, positions[:, None]
        first, last = batch.order.span[g]
        blocks = []
        for j in range(first // BLOCK, -(-last // BLOCK)):
            at = torch.arange(j * BLOCK, (j + 1) * BLOCK, device=base.device).expand(len(positions), BLOCK)
            seen = at <= query
            if group.window:
                seen = seen & (at > query - group.window)
            blocks.append((torch.where(seen, entry(at), void).view(-1), seen[:, None, None]))
        out.append(View(entry(positions), tuple(blocks)))
    return out


class Attend:
    """The `attend` of models_torch: the caches are changed in place."""

    def __init__(self, views: list[View]) -> None:
        self.views = views

    def __call__(
        self,
        a: Attention,
        q: Array,
        k: Array,
        v: Array,
        cache: Caches,
        place: Place,
        sinks: Array | None = None,
        scales: tuple[Array, Array] | None = None,
        turn: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Caches]:
        store, view = cache.groups[place.group][place.rank], self.views[place.group]
        by, written = scales or (None, None)
        q = write(q, k, v, turn, view.write, store, written)
        tokens, kv_heads, size = k.shape
        grouped = q.reshape(tokens, kv_heads, -1, size).float()
        top = grouped.new_full((*grouped.shape[:3], 1), FAR)
        total, acc = torch.zeros_like(top), torch.zeros_like(grouped)
        if sinks is not None:  # seen before any key, with a value of nothing
            top, total = sinks.float().view(kv_heads, -1, 1).expand_as(top), total + 1
        for read, seen in view.blocks:
            kv = widen(take(store, read).view(tokens, BLOCK, 2, kv_heads, size), torch.float32, by)
            s = torch.matmul(grouped, kv[:, :, 0].permute(0, 2, 3, 1)) * a.scale
            s = (s if a.cap is None else torch.tanh(s / a.cap) * a.cap).masked_fill_(~seen, FAR)
            peak = torch.maximum(top, s.amax(-1, keepdim=True))
            p, fade = (s - peak).exp_(), (top - peak).exp_()
            total = total * fade + p.sum(-1, keepdim=True)
            acc = acc * fade + torch.matmul(p, kv[:, :, 1].transpose(1, 2))
            top = peak
        return (acc / total).view(q.shape).to(q.dtype), cache


def choose(logits: Array, draws: Draws | None, position: Array, raw: Array | None) -> Array:
    """`sampler.choose`, row by row."""
    place = {} if draws is None else {at: i for i, at in enumerate(draws.at.tolist())}

    def of(row: int) -> Draws | None:
        if draws is None or row not in place:
            return None
        i = slice(place[row], place[row] + 1)
        names = ("seed", "temperature", "top_k", "top_p", "min_p")
        return replace(draws, at=torch.zeros_like(draws.at[i]), **{name: getattr(draws, name)[i] for name in names})

    rows = [slice(i, i + 1) for i in range(len(logits))]
    return torch.cat(
        [sampler.choose(logits[r], of(r.start), position[r], None if raw is None else raw[r]) for r in rows], 1
    )


def score(logits: Array, tokens: Array, alternatives: int) -> Scores:
    """`choosing.score`, row by row."""
    parts = [choosing.score(x[None], t[None], alternatives) for x, t in zip(logits, tokens, strict=True)]
    return Scores(*(torch.cat(each) for each in zip(*parts, strict=True)))
