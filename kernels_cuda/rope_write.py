"""q and k rotated, and k and v written to the cache, rounded to its 8 bits where it has them, in one pass over what the
projections gave."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels_cuda.overlap import options, ready, wait

HEADS = 8
"""Heads of a program."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = {torch.int8: 1, torch.float8_e4m3fn: 2}
"""Stores of 8 bits, as the kernel counts them."""


def supports(q: Any, k: Any, v: Any, store: Any, dim: int) -> str:
    """Why the kernel is not for q [T, q_heads, D], k and v [T, kv_heads, D] and a store [entries, 2, kv_heads, D], of
    which `dim` dimensions are rotated; "" where it is."""
    if any(x.dtype not in DTYPES or x.dtype != q.dtype for x in (q, k, v)):
        return f"{q.dtype}, {k.dtype}, {v.dtype}"
    if store.dtype not in (*DTYPES, *KINDS):
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
) -> torch.Tensor:
    """What `rope_write` does, in torch."""

    def turned(x: torch.Tensor) -> torch.Tensor:
        if turn is None:
            return x.contiguous()
        half = turn[0].shape[-1] // 2
        part = x[..., : 2 * half]
        return torch.cat([(part * turn[0]).addcmul_(part.roll(half, -1), turn[1]), x[..., 2 * half :]], -1)

    real = write >= 0
    store[write[real].long()] = torch.stack((turned(k), v), 1)[real].to(store.dtype)
    return turned(q)


def rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor] | None,
    write: torch.Tensor,
    store: torch.Tensor,
    inverses: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [T, q_heads, D], k and v [T, kv_heads, D], tokens at any distances -> q rotated, side by side; k, rotated too,
    and v go to the store [entries, 2, kv_heads, D].

    turn: cos and sin [T, 1, dim] in q's dtype, as models_torch.ops.angles gives them (cos twice, sin once negative);
    None rotates nothing. write int[T]: the entry of each token's key and value, -1 = none. inverses float32[2,
    kv_heads]: of the scales of a store of 8 bits, which holds numbers times these, the nearest, ties to even; past its
    largest that, and NaN, which int8 has not, as 0.
    """
    assert (inverses is not None) == (store.dtype in KINDS), "a store of 8 bits has scales, no other has"
    tokens, q_heads, size = q.shape
    kv_heads = k.shape[1]
    out = torch.empty((tokens, q_heads, size), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    cos, sin = turn if turn is not None else (q, q)
    dim = cos.shape[-1] if turn is not None else 0
    groups = triton.cdiv(q_heads, HEADS)
    _rope_write[(tokens, groups + triton.cdiv(kv_heads, HEADS))](
        q,
        k,
        v,
        cos,
        sin,
        write,
        store.view(torch.uint8) if store.dtype == torch.float8_e4m3fn else store,
        q if inverses is None else inverses,
        out,
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
        KIND=KINDS.get(store.dtype, 0),
        num_warps=4,
        **options(q),
    )
    return out


@triton.jit
def _rope_write(
    q,
    k,
    v,
    cos,
    sin,
    write,
    store,
    inverses,
    out,
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
    KIND: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program: HEADS query heads of a token, or so many key and value heads."""
    ready(OVERLAP)
    wait(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    every = tl.full((HEADS, 1), 1, tl.int1)
    if group < GROUPS:
        head = (group * HEADS + tl.arange(0, HEADS))[:, None]
        source = q + token * q_stride + head * size
        turned = out + (token * q_heads + head) * size
        _move(source, turned, cos, sin, token, head < q_heads, every, every, size, half, HALF, REST, 0)
    else:
        head = ((group - GROUPS) * HEADS + tl.arange(0, HEADS))[:, None]
        mine = head < kv_heads
        entry = tl.load(write + token).to(tl.int64)
        kept = every & (entry >= 0)
        to = store + entry * (2 * kv_heads * size) + head * size
        by, by_value = every, every
        if KIND > 0:
            by = tl.load(inverses + head, mask=mine, other=0.0)
            by_value = tl.load(inverses + kv_heads + head, mask=mine, other=0.0)
        _move(k + token * k_stride + head * size, to, cos, sin, token, mine, kept, by, size, half, HALF, REST, KIND)
        e = tl.arange(0, SIZE)[None, :]
        value = tl.load(v + token * v_stride + head * size + e, mask=mine & (e < size), other=0.0)
        _put(to + kv_heads * size + e, value, by_value, mine & kept & (e < size), KIND)


@triton.jit
def _put(to, x, by, mask, KIND: tl.constexpr):
    """Numbers as the store has them, times `by` where it has 8 bits. By bits of float32, since these are the same on
    every device: a number as large as the one that is added leaves its nearest, ties to even, in the lowest bits."""
    if KIND == 0:
        tl.store(to, x.to(to.dtype.element_ty), mask=mask)
    else:
        x = x.to(tl.float32) * by
        most: tl.constexpr = 127.0 if KIND == 1 else 448.0
        x = tl.where(x > most, most, tl.where(x < -most, -most, x))
        if KIND == 1:
            near = (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
            tl.store(to, tl.where(x == x, near, 0).to(tl.int8), mask=mask)
        else:
            bits = x.to(tl.int32, bitcast=True)
            size = bits & 0x7FFFFFFF
            small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
            near = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960  # exponents begin 120 lower, times 8
            near = tl.where(size < 0x3C800000, small, tl.where(x == x, near, 0x7F))
            tl.store(to, (near | ((bits >> 24) & 0x80)).to(tl.uint8), mask=mask)


@triton.jit
def _move(
    source,
    to,
    cos,
    sin,
    token,
    mine,
    kept,
    by,
    size: tl.constexpr,
    half: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    KIND: tl.constexpr,
):
    """Heads rotated from one place to another: rounded after each product, as plain torch does. by, KIND: of `_put`."""
    if half > 0:
        d = tl.arange(0, HALF)[None, :]
        inside = mine & (d < half)
        low = tl.load(source + d, mask=inside, other=0.0)
        high = tl.load(source + half + d, mask=inside, other=0.0)
        kind = low.dtype
        line = token * (2 * half) + d
        c = tl.load(cos + line, mask=d < half, other=0.0).to(tl.float32)
        s = tl.load(sin + line + half, mask=d < half, other=0.0).to(tl.float32)
        low, high = low.to(tl.float32), high.to(tl.float32)
        a = ((low * c).to(kind).to(tl.float32) - high * s).to(kind)
        b = ((high * c).to(kind).to(tl.float32) + low * s).to(kind)
        _put(to + d, a, by, inside & kept, KIND)
        _put(to + half + d, b, by, inside & kept, KIND)
    if size > 2 * half:
        r = 2 * half + tl.arange(0, REST)[None, :]
        rest = tl.load(source + r, mask=mine & (r < size), other=0.0)
        _put(to + r, rest, by, mine & kept & (r < size), KIND)
