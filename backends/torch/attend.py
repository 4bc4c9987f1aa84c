"""Paged attention in plain torch: gather what a bunch of rows may see, then one dense attention over it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch.nn import functional as F

from backends.api.limits import Limits
from backends.torch.caches import Caches, narrow, put, take, widen
from backends.torch.inputs import Batch
from engine.config import Resolved
from engine.model.groups import Place
from engine.model.spec import Attention

Array: TypeAlias = torch.Tensor
Kernel: TypeAlias = Callable[[Attention, Array, Array, Array, Array, Array | None], Array]
"""a, q [B, Q, q_heads, D], k and v [B, L, kv_heads, D], mask [B, 1, Q, L] of 0 and -inf, sinks [q_heads] ->
[B, Q, q_heads, D]."""


def choose(a: Attention, config: Resolved) -> tuple[Kernel, str]:
    """The kernel for a layer, and why."""
    what = f"head {a.head_dim}, {config.cache_dtype} cache"
    if a.cap is not None or a.sinks:
        odd = "a soft cap" if a.cap is not None else "sinks"
        return explicit, f"matmul and softmax over gathered pages, {what}: fused kernels have no {odd}"
    if config.platform == "cpu":
        return fused, f"torch's fused CPU attention over gathered pages, {what}"
    if config.dtype == "float32":
        return explicit, f"matmul and softmax over gathered pages, {what}: fused kernels round float32 on this device"
    return spread, f"torch's fused attention over gathered pages, {what}: no paged kernel is built for torch yet"


def fused(a: Attention, q: Array, k: Array, v: Array, mask: Array, sinks: Array | None) -> Array:
    """One call. A single query's heads that share a kv head become queries: that reads k and v once, and is faster."""
    rows, queries, heads, dim = q.shape
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if queries == 1:
        o = F.scaled_dot_product_attention(q.view(rows, k.shape[1], -1, dim), k, v, attn_mask=mask, scale=a.scale)
        return o.reshape(rows, 1, heads, dim)
    q = q.transpose(1, 2)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=a.scale, enable_gqa=heads != k.shape[1])
    return o.transpose(1, 2)


def explicit(a: Attention, q: Array, k: Array, v: Array, mask: Array, sinks: Array | None) -> Array:
    """Two products and a softmax, in the dtype of q; the queries of a kv head's group stand side by side."""
    rows, queries, heads, dim = q.shape
    shared = k.shape[2]
    grouped = q.view(rows, queries, shared, -1, dim).permute(0, 2, 3, 1, 4).reshape(rows, shared, -1, dim)
    s = torch.matmul(grouped, k.permute(0, 2, 3, 1)).view(rows, heads, queries, -1)
    s = s * a.scale if a.cap is None else torch.tanh(s * (a.scale / a.cap)) * a.cap
    s = s + mask
    if sinks is not None:  # one more score, whose value is nothing
        s = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(rows, heads, queries, 1)], -1)
    p = s.softmax(-1)[..., : k.shape[1]].reshape(rows, shared, -1, k.shape[1])
    o = torch.matmul(p, v.transpose(1, 2)).view(rows, heads, queries, dim)
    return o.transpose(1, 2)


def spread(a: Attention, q: Array, k: Array, v: Array, mask: Array, sinks: Array | None) -> Array:
    """`fused` for GPUs, whose call with a mask knows no shared heads: k and v are repeated for several queries."""
    if q.shape[1] > 1:
        group = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    return fused(a, q, k, v, mask, sinks)


class Sight(NamedTuple):
    """What a bunch of rows sees of a cache group. read int64[B*L]: entries of the cache; mask [B, 1, Q, L]."""

    read: Array
    mask: Array


class View(NamedTuple):
    """A cache group as a step sees it. write int64[T]: entries that the new keys and values go to."""

    write: Array
    sights: tuple[Sight, ...]


def locate(
    batch: Batch, caches: Caches, before: Array, positions: Array, limits: Limits, dtype: torch.dtype
) -> list[View]:
    """The cache groups as this step sees them. before int64[R]: lengths before the step; positions int64[T]."""
    out = []
    for g, (group, width) in enumerate(zip(limits.groups, limits.max_row_pages, strict=True)):
        page, base = group.page, batch.base[g]
        table = caches.tables[g].index_select(0, batch.slots)
        place = positions - base[batch.row]
        entry = batch.row * width + (place // page).clamp_(0, width - 1)
        write = table.view(-1)[entry] * page + place % page
        void, step = caches.groups[g].shape[1] - 1, torch.arange(page, device=base.device)
        sights = []
        for bunch in batch.order.bunches:
            rows, length = bunch.rows, bunch.reach[g] * page
            cell = (table[rows, : bunch.reach[g], None] * page + step).view(-1, length)
            at = base[rows, None] + torch.arange(length, device=base.device)
            start, query = before[rows, None], positions[bunch.tokens].view(-1, bunch.queries, 1)
            written, seen = at < start + bunch.queries, at[:, None] <= query
            if group.window:
                written &= at > start - group.window
                seen &= at[:, None] > query - group.window
            read = torch.where(written, cell, void).view(-1)
            mask = torch.where(seen, 0.0, -math.inf).to(dtype)
            sights.append(Sight(read, mask[:, None]))
        out.append(View(write, tuple(sights)))
    return out


class Attend:
    """The `attend` of models_torch: the caches are changed in place."""

    def __init__(self, config: Resolved, batch: Batch, views: list[View]) -> None:
        self.config, self.bunches, self.views = config, batch.order.bunches, views

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
    ) -> tuple[Array, Caches]:
        kernel, _ = choose(a, self.config)
        store, view = cache.groups[place.group][place.rank], self.views[place.group]
        by, written = scales or (None, None)
        put(store, view.write, narrow(torch.stack((k, v), 1), store.dtype, written))
        parts = []
        for bunch, sight in zip(self.bunches, view.sights, strict=True):
            query = q[bunch.tokens].view(-1, bunch.queries, *q.shape[1:])
            kv = widen(take(store, sight.read).view(query.shape[0], -1, *store.shape[1:]), q.dtype, by)
            o = kernel(a, query, kv[:, :, 0], kv[:, :, 1], sight.mask, sinks)
            parts.append(o.reshape(-1, *q.shape[1:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts), cache
