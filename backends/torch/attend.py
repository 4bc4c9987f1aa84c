"""Attention of a step: kernels over pages on a GPU, or plain torch: gather what a bunch of rows may see, then one dense
attention over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.nn import functional as F

from backends.api.limits import Limits
from backends.torch.branches import Branches
from backends.torch.buckets import Shape
from backends.torch.caches import DTYPES as HELD
from backends.torch.caches import Caches, narrow, put, take, widen
from backends.torch.inputs import Batch, Bunch
from backends.torch.params import DTYPES
from engine.config import Resolved
from engine.model.groups import Place
from engine.model.spec import Attention
from kernels_cuda import attention as gpu
from kernels_cuda import cascade
from models_torch import ops

Array: TypeAlias = torch.Tensor
Kernel: TypeAlias = Callable[[Attention, Array, Array, Array, Array, Array | None], Array]
"""a, q [B, Q, q_heads, D], k and v [B, L, kv_heads, D], mask [B, 1, Q, L] of 0 and -inf, sinks [q_heads] ->
[B, Q, q_heads, D]."""


@lru_cache(maxsize=1)
def machine() -> tuple[str, str, bool, bool]:
    """cuda or hip, the architecture of its device, and whether Triton and FlashInfer are installed."""
    device = torch.device("cuda", torch.cuda.current_device())
    triton, flashinfer = (find_spec(name) is not None for name in ("triton", "flashinfer"))
    return "hip" if torch.version.hip else "cuda", gpu.arch_of(device), triton, flashinfer


def choose(a: Attention, config: Resolved, on: str = "") -> tuple[str, str]:
    """The kernel for a layer, and why: "triton", or a name of KERNELS. on: the architecture of a GPU that is only
    described; else the one that is here."""
    why, what = "no GPU", f"head {a.head_dim}, {config.cache_dtype} cache"
    if config.platform == "gpu":
        described = ("hip" if on.startswith("gfx") else "cuda", on, True, False)
        platform, arch, installed, peer = described if on else machine()
        dtype, store = DTYPES[config.dtype], HELD[config.cache_dtype]
        group = a.q_heads // a.kv_heads
        name, why = gpu.choose(
            platform=platform,
            arch=arch,
            triton=installed,
            head_dim=a.head_dim,
            group=group,
            dtype=dtype,
            store=store,
            page=config.page,
            plain=a.window is None and a.cap is None and not a.sinks,
            flashinfer=peer,
        )
        if name == "triton":
            together = config.cascade != "off" and a.window is None
            return name, why + (", shared prefixes once for all rows where it pays" if together else "")
    if a.cap is not None or a.sinks:
        odd = "a soft cap" if a.cap is not None else "sinks"
        return "explicit", f"matmul and softmax over gathered pages, {what}: fused kernels have no {odd}"
    if config.platform == "cpu":
        return "fused", f"torch's fused CPU attention over gathered pages, {what}"
    if config.dtype == "float32":
        return "explicit", f"matmul and softmax over gathered pages, {what}: {why}; fused kernels round float32 here"
    return "spread", f"torch's fused attention over gathered pages, {what}: {why}"


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


KERNELS: Mapping[str, Kernel] = {"fused": fused, "explicit": explicit, "spread": spread}
"""Of gathered pages, by name."""


class Sight(NamedTuple):
    """What a bunch of rows sees of a cache group. read int64[B*L]: entries of the cache; mask [B, 1, Q, L]."""

    read: Array
    mask: Array


def write(
    q: Array,
    k: Array,
    v: Array,
    turn: tuple[Array, Array] | None,
    to: Array,
    store: Array,
    inverses: Array | None = None,
    padded: bool = False,
) -> Array:
    """q [T, q_heads, head_dim] rotated by `turn`, side by side; k, rotated too, and v [T, kv_heads, head_dim] go to
    entries `to` of the store. inverses: of the scales of a store of 8 bits. padded: some entries may be -1, none."""
    fused = ops.kernel("rope_write", q.device.type)
    if fused is not None and not fused.supports(q, k, v, store, 0 if turn is None else turn[0].shape[-1]):
        return fused.rope_write(q, k, v, turn, to, store, inverses)  # type: ignore[no-any-return]
    if turn is not None:
        q, k = ops.rotate(q, *turn), ops.rotate(k, *turn)
    kv = torch.stack((k, v), 1)
    if padded:  # the last entry stays zero: what has no entry is written there as nothing
        kv.masked_fill_((to < 0)[:, None, None, None], 0)
        to = torch.where(to < 0, store.shape[0] - 1, to)
    put(store, to, narrow(kv, store.dtype, inverses))
    return q.contiguous()


def aim(batch: Batch, table: Array, g: int, positions: Array, page: int) -> Array:
    """int64[T]: entries that the new keys and values of cache group g go to, -1 of padding. table [R, width]: of the
    step's rows."""
    at, width = positions - batch.base[g][batch.row], table.shape[1]
    entry = batch.row * width + (at // page).clamp_(0, width - 1)
    to = table.view(-1)[entry] * page + at % page
    return to if batch.shape is None else torch.where(batch.offset >= 0, to, -1)


def look(
    batch: Batch,
    bunches: Sequence[Bunch],
    table: Array,
    g: int,
    before: Array,
    positions: Array,
    limits: Limits,
    void: int,
    dtype: torch.dtype,
) -> tuple[Sight, ...]:
    """Cache group g as each bunch sees it. void: the entry that is read for what is not seen."""
    group, base = limits.groups[g], batch.base[g]
    page, out = group.page, []
    step = torch.arange(page, device=base.device)
    for bunch in bunches:
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
        out.append(Sight(read, mask[:, None]))
    return tuple(out)


class Attend:
    """The `attend` of models_torch: the caches are changed in place. before int64[R]: lengths before the step;
    positions int64[T]. What a cache group is to a kind of kernel is found when a layer first asks. seen: what each
    group is to the rows, as `kernels_cuda.begin` tells it, where all layers are attended by kernels over pages."""

    def __init__(
        self,
        config: Resolved,
        batch: Batch,
        caches: Caches,
        before: Array,
        positions: Array,
        limits: Limits,
        seen: Sequence[Any] | None = None,
    ) -> None:
        self.config, self.batch, self.limits = config, batch, limits
        self.before, self.positions, self.seen = before, positions, seen
        if seen is not None:
            self.write = [group.write for group in seen]
        else:
            self.tables = [table.index_select(0, batch.slots) for table in caches.tables]
            self.write = [aim(batch, table, g, positions, limits.groups[g].page) for g, table in enumerate(self.tables)]
        self.sights: dict[int, tuple[int, tuple[Sight, ...]]] = {}
        self.rows: dict[int, tuple[gpu.Rows, gpu.Plan]] = {}
        self.branches = batch.branches
        if batch.branches is not None:
            self.branches = Branches(cascade.Tiles(*(x.int() for x in batch.branches.tiles)), batch.branches.shape)
        if batch.now is not None:  # ahead of what a capture leaves out
            for g in range(len(limits.groups)):
                self._rows(g)

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
        name, _ = choose(a, self.config)
        store = cache.groups[place.group][place.rank]
        by, written = scales or (None, None)
        q = write(q, k, v, turn, self.write[place.group], store, written, self.batch.shape is not None)
        if name == "triton":
            return self._paged(a, q, store, place.group, sinks, by), cache
        gathered = partial(self._gathered, KERNELS[name], a, q, store, place.group, sinks, by)
        return ops.outside(gathered), cache

    def _paged(self, a: Attention, q: Array, store: Array, g: int, sinks: Array | None, by: Array | None) -> Array:
        group = self.limits.groups[g]
        rows, plan = self._rows(g)
        plain, arch = a.window is None and a.cap is None and sinks is None, gpu.arch_of(q.device)
        over = gpu.hopper(arch, a.head_dim, q.shape[1] // store.shape[2], q.dtype, store.dtype, group.page, plain=plain)
        if not over and gpu.whole(plan, arch, a.head_dim, q.dtype, store.dtype, plain=plain):
            return gpu.fresh(q, store.index_select(0, self.write[g]), rows, plan, scale=a.scale)
        how = {"page": group.page, "scale": a.scale, "window": a.window, "cap": a.cap, "sinks": sinks, "scales": by}
        return gpu.attention(q, store, rows, plan, **how, shared=None if group.window else self.branches)

    def _rows(self, g: int) -> tuple[gpu.Rows, gpu.Plan]:
        if g not in self.rows:
            if self.seen is not None:
                rows = gpu.Rows(*self.seen[g][:4])
            else:
                rows = as_rows(self.batch, self.tables[g], g, self.before)
            self.rows[g] = rows, choose_plan(self.batch, g, self.limits, self.before.device)
        return self.rows[g]

    def _gathered(
        self, kernel: Kernel, a: Attention, q: Array, store: Array, g: int, sinks: Array | None, by: Array | None
    ) -> Array:
        now = self.batch.now
        turn, bunches = (0, self.batch.order.bunches) if now is None else (now.turn, now.bunches)
        if g not in self.sights or self.sights[g][0] != turn:
            void, dtype = len(store) - 1, DTYPES[self.config.dtype]
            seen = look(self.batch, bunches, self.tables[g], g, self.before, self.positions, self.limits, void, dtype)
            self.sights[g] = turn, seen
        parts, told = [], None if self.limits.groups[g].window else self.branches
        if told is not None:  # rows of one token, which lead
            made, page = torch.zeros_like(q[: told.shape.rows]), self.limits.groups[g].page
            how = {"page": page, "scale": a.scale, "cap": a.cap, "sinks": sinks, "scales": by}
            cascade.plain(q, store, made, self._rows(g)[0], told.tiles, told.shape, **how)
            parts.append(made)
        for bunch, sight in zip(bunches, self.sights[g][1], strict=True):
            if told is not None and bunch.queries == 1:
                continue
            query = q[bunch.tokens].view(-1, bunch.queries, *q.shape[1:])
            kv = widen(take(store, sight.read).view(query.shape[0], -1, *store.shape[1:]), q.dtype, by)
            o = kernel(a, query, kv[:, :, 0], kv[:, :, 1], sight.mask, sinks)
            parts.append(o.reshape(-1, *q.shape[1:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def as_rows(batch: Batch, table: Array, g: int, before: Array) -> gpu.Rows:
    """Cache group g as kernels over pages want it. table [R, width]: of the step's rows."""
    return gpu.Rows(batch.first.int(), before.int(), batch.base[g].int(), table.int())


def choose_plan(batch: Batch, g: int, limits: Limits, device: torch.device) -> gpu.Plan:
    """What a step is to kernels over pages of cache group g."""
    sms = processors(device)
    if batch.shape is not None:  # a plan for every step of the shape
        return plan(batch.shape, limits.max_len, sms)
    bunches = batch.order.bunches
    lens = [b.queries for b in bunches for _ in range(b.rows.start, b.rows.stop)]
    reach = max(b.reach[g] for b in bunches) * limits.groups[g].page
    made = gpu.plan(lens, reach, sms=sms, fresh=batch.order.fresh)
    return made if made.few == 1 else replace(made, few=gpu.FEW)  # one kernel for all short rows of several


def plan(shape: Shape, reach: int, sms: int) -> gpu.Plan:
    """Of every step that is padded to a shape: rows of one token, or of any. What padding gets is not looked at."""
    short = shape.rows if shape.even else 0
    return replace(gpu.plan((), reach, sms=sms, rows=shape.rows, tokens=shape.tokens), short=short, padded=False)


@lru_cache(maxsize=8)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 of a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
