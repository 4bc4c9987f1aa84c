"""What deterministic mode does by itself: attention over fixed absolute blocks of the cache, a token at a time, and
choosing and scoring, a row at a time, since torch sums one row otherwise than several.

A block that a query sees nothing of adds nothing, exactly: so what a token gets depends on its own position alone, not
on how long the others of its tile are. The kernels of GPUs are so by themselves where every token is a row of its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from backends.api.limits import Limits
from backends.torch import attend, choosing, sampler
from backends.torch.caches import Caches, take, widen
from backends.torch.choosing import Scores
from backends.torch.inputs import Batch, Draws
from engine.config import Resolved
from engine.model.groups import Place
from engine.model.spec import Attention
from kernels_cuda import attention as gpu
from models_torch import ops

Array = torch.Tensor
BLOCK = 128
"""Positions of the cache that are reduced at once."""
FAR = -1e30
"""Score of what a query does not see: finite, so that no difference of scores is NaN."""


def entries(batch: Batch, caches: Caches, limits: Limits, g: int, at: Array) -> Array:
    """Entries of cache group g at positions `at` int64[T, ...]; of one that the table has not, some other."""
    page, width = limits.groups[g].page, limits.max_row_pages[g]
    more = (...,) + (None,) * (at.ndim - 1)
    cells = caches.tables[g].index_select(0, batch.slots).view(-1)
    place = at - batch.base[g][batch.row][more]
    index = (batch.row * width)[more] + (place // page).clamp(0, len(cells) // len(batch.slots) - 1)
    return cells[index] * page + place % page


def blocks(batch: Batch, caches: Caches, positions: Array, limits: Limits, g: int) -> tuple[tuple[Array, Array], ...]:
    """What each token of cache group g sees, block by block: entries to read int64[T * BLOCK], and which of them it
    sees, bool[T, 1, 1, BLOCK]. positions int64[T]."""
    void, query, window = caches.groups[g].shape[1] - 1, positions[:, None], limits.groups[g].window
    first, last = batch.order.span[g]
    out = []
    for j in range(first // BLOCK, -(-last // BLOCK)):
        at = torch.arange(j * BLOCK, (j + 1) * BLOCK, device=positions.device).expand(len(positions), BLOCK)
        seen = at <= query
        if window:
            seen = seen & (at > query - window)
        read = torch.where(seen, entries(batch, caches, limits, g, at), void).view(-1)
        out.append((read, seen[:, None, None]))
    return tuple(out)


class Attend:
    """The `attend` of models_torch: the caches are changed in place. positions int64[T]."""

    def __init__(self, config: Resolved, batch: Batch, caches: Caches, positions: Array, limits: Limits) -> None:
        self.config, self.batch, self.limits, self.positions = config, batch, limits, positions
        self.write = [entries(batch, caches, limits, g, positions) for g in range(len(limits.groups))]
        self.blocks: dict[int, tuple[tuple[Array, Array], ...]] = {}
        self.rows: dict[int, gpu.Rows] = {}

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
        g, store = place.group, cache.groups[place.group][place.rank]
        by, written = scales or (None, None)
        q = attend.write(q, k, v, turn, self.write[g], store, written)
        # a window's table begins where its first page happens to, and with it the kernel's blocks
        if not self.limits.groups[g].window and attend.choose(a, self.config)[0] == "triton":
            return self._paged(a, q, cache, place, sinks, by), cache
        if g not in self.blocks:
            self.blocks[g] = blocks(self.batch, cache, self.positions, self.limits, g)
        return plain(a, q, store, self.blocks[g], sinks, by), cache

    def _paged(
        self, a: Attention, q: Array, cache: Caches, place: Place, sinks: Array | None, by: Array | None
    ) -> Array:
        """Every token a row: its keys are cut by its own position, and no more parts are made where rows are fewer."""
        g, limits, count = place.group, self.limits, len(q)
        if g not in self.rows:
            row, table = self.batch.row, cache.tables[g].index_select(0, self.batch.slots)
            first = torch.arange(count + 1, dtype=torch.int32, device=q.device)
            self.rows[g] = gpu.Rows(first, self.positions.int(), self.batch.base[g][row].int(), table[row].int())
        plan = gpu.plan((), limits.max_len, sms=attend.processors(q.device), rows=count, tokens=count)
        plan = replace(plan, short=count, padded=False)
        page, store = limits.groups[g].page, cache.groups[g][place.rank]
        return gpu.attention(q, store, self.rows[g], plan, page=page, scale=a.scale, cap=a.cap, sinks=sinks, scales=by)


def plain(
    a: Attention,
    q: Array,
    store: Array,
    told: tuple[tuple[Array, Array], ...],
    sinks: Array | None,
    by: Array | None,
) -> Array:
    """Attention of q [T, q_heads, D] over blocks of a store; by float32[2, kv_heads]: scales of one of 8 bits."""
    (tokens, _, size), kv_heads = q.shape, store.shape[2]
    grouped = q.reshape(tokens, kv_heads, -1, size).float()
    top = grouped.new_full((*grouped.shape[:3], 1), FAR)
    total, acc = torch.zeros_like(top), torch.zeros_like(grouped)
    if sinks is not None:  # seen before any key, with a value of nothing
        top, total = sinks.float().view(kv_heads, -1, 1).expand_as(top), total + 1
    for read, seen in told:
        kv = widen(take(store, read).view(tokens, BLOCK, 2, kv_heads, size), torch.float32, by)
        s = torch.matmul(grouped, kv[:, :, 0].permute(0, 2, 3, 1)) * a.scale
        s = (s if a.cap is None else torch.tanh(s / a.cap) * a.cap).masked_fill_(~seen, FAR)
        peak = torch.maximum(top, s.amax(-1, keepdim=True))
        p, fade = (s - peak).exp_(), (top - peak).exp_()
        total = total * fade + p.sum(-1, keepdim=True)
        acc = acc * fade + torch.matmul(p, kv[:, :, 1].transpose(1, 2))
        top = peak
    return (acc / total).view(q.shape).to(q.dtype)


def choose(logits: Array, draws: Draws | None, position: Array, raw: Array | None) -> Array:
    """`sampler.choose`, row by row; the kernel of GPUs is so by itself."""
    fused = ops.kernel("sample", logits.device.type)
    if fused is not None and not fused.supports(logits) and (draws is None or draws.every):
        return sampler.choose(logits, draws, position, raw)
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
