"""q and k rotated in place, and k and v written to the cache, in one pass over what the projections gave."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

HEADS = 8
"""Heads of a program."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(q: Any, k: Any, v: Any, store: Any, dim: int) -> str:
    """Why the kernel is not for q [T, q_heads, D], k and v [T, kv_heads, D] and a store [entries, 2, kv_heads, D], of
    which `dim` dimensions are rotated; "" where it is."""
    if any(x.dtype not in DTYPES or x.dtype != q.dtype for x in (q, k, v)):
        return f"{q.dtype}, {k.dtype}, {v.dtype}"
    if store.dtype not in DTYPES:
        return f"a store of {store.dtype}"
    if any(x.stride(2) != 1 or x.stride(1) != x.shape[2] for x in (q, k, v)) or not store.is_contiguous():
        return "heads that do not lie side by side"
    if dim % 2 or dim > q.shape[2]:
        return f"{dim} of {q.shape[2]} dimensions rotated"
    return ""


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor] | None,
    write: torch.Tensor,
    store: torch.Tensor,
) -> None:
    """What `rope_write` does, in torch."""
    if turn is not None:
        cos, sin = turn
        half = cos.shape[-1] // 2
        for x in (q, k):
            part = x[..., : 2 * half]
            part.copy_((part * cos).addcmul_(part.roll(half, -1), sin))
    real = write >= 0
    store[write[real].long()] = torch.stack((k, v), 1)[real].to(store.dtype)


def rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor] | None,
    write: torch.Tensor,
    store: torch.Tensor,
) -> None:
    """Changes q and k [T, heads, D] and the store [entries, 2, kv_heads, D].

    turn: cos and sin [T, 1, dim] in q's dtype, as models_torch.ops.angles gives them (cos twice, sin once negative);
    None rotates nothing. write int[T]: the entry of each token's key and value, -1 = none.
    """
    tokens, q_heads, size = q.shape
    kv_heads = k.shape[1]
    if not tokens:
        return
    cos, sin = turn if turn is not None else (q, q)
    dim = cos.shape[-1] if turn is not None else 0
    groups = triton.cdiv(q_heads, HEADS) if dim else 0
    _rope_write[(tokens, groups + triton.cdiv(kv_heads, HEADS))](
        q,
        k,
        v,
        cos,
        sin,
        write,
        store,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        q_heads=q_heads,
        kv_heads=kv_heads,
        size=size,
        half=dim // 2,
        HALF=triton.next_power_of_2(max(dim // 2, 1)),
        REST=triton.next_power_of_2(max(size - dim, 1)),
        SIZE=triton.next_power_of_2(size),
        GROUPS=groups,
        HEADS=HEADS,
        num_warps=4,
    )


@triton.jit
def _rope_write(
    q,
    k,
    v,
    cos,
    sin,
    write,
    store,
    q_stride,
    k_stride,
    v_stride,
    q_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    size: tl.constexpr,
    half: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    d = tl.arange(0, HALF)
    if group < GROUPS:
        head = group * HEADS + tl.arange(0, HEADS)
        inside = (head < q_heads)[:, None] & (d < half)[None, :]
        at = q + token * q_stride + head[:, None] * size + d[None, :]
        low, high = _turn(at, cos, sin, token, d, inside, half)
        tl.store(at, low, mask=inside)
        tl.store(at + half, high, mask=inside)
    else:
        head = (group - GROUPS) * HEADS + tl.arange(0, HEADS)
        mine = (head < kv_heads)[:, None]
        entry = tl.load(write + token).to(tl.int64)
        kept = mine & (entry >= 0)
        line = store + entry * (2 * kv_heads * size) + head[:, None] * size
        source = k + token * k_stride + head[:, None] * size
        kind = store.dtype.element_ty
        if half > 0:
            inside = mine & (d < half)[None, :]
            low, high = _turn(source + d[None, :], cos, sin, token, d, inside, half)
            tl.store(source + d[None, :], low, mask=inside)
            tl.store(source + half + d[None, :], high, mask=inside)
            tl.store(line + d[None, :], low.to(kind), mask=inside & kept)
            tl.store(line + half + d[None, :], high.to(kind), mask=inside & kept)
        if size > 2 * half:
            r = 2 * half + tl.arange(0, REST)
            some = mine & (r < size)[None, :]
            rest = tl.load(source + r[None, :], mask=some, other=0.0)
            tl.store(line + r[None, :], rest.to(kind), mask=some & kept)
        e = tl.arange(0, SIZE)
        whole = mine & (e < size)[None, :]
        value = tl.load(v + token * v_stride + head[:, None] * size + e[None, :], mask=whole, other=0.0)
        tl.store(line + kv_heads * size + e[None, :], value.to(kind), mask=whole & kept)


@triton.jit
def _turn(at, cos, sin, token, d, inside, half: tl.constexpr):
    """The two halves of heads, rotated: rounded after each product, as plain torch does. A thread holds both entries
    that mix, so that they may be written where they were read."""
    low = tl.load(at, mask=inside, other=0.0)
    high = tl.load(at + half, mask=inside, other=0.0)
    kind = low.dtype
    line = token * (2 * half) + d
    c = tl.load(cos + line, mask=d < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + line + half, mask=d < half, other=0.0).to(tl.float32)[None, :]
    low, high = low.to(tl.float32), high.to(tl.float32)
    a = ((low * c).to(kind).to(tl.float32) - high * s).to(kind)
    b = ((high * c).to(kind).to(tl.float32) + low * s).to(kind)
    return a, b
