"""RMSNorm, with the addition that stands before it: the sum is written and normed in one pass, as each is read once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels_cuda.overlap import options, ready, wait

KINDS = {"plain": 0, "wide": 1, "offset": 2}
"""As engine.model.spec.Norm has them."""
WIDEST = 32768
"""Entries of a row that a program holds in registers."""
TILE = 1024
"""Entries of a program whose rows are narrow."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(x: Any, y: Any = None) -> str:
    """Why the kernel is not for x [..., size] (and y, alike); "" where it is."""
    if x.dtype not in DTYPES or (y is not None and (y.dtype != x.dtype or y.shape != x.shape)):
        return f"{x.dtype} and {None if y is None else y.dtype}"
    if x.shape[-1] > WIDEST:
        return f"rows of {x.shape[-1]}"
    if not all(_rows(t) for t in (x, y) if t is not None):
        return "rows that do not lie at equal distances"
    return ""


def _rows(x: torch.Tensor) -> bool:
    """Whether x [T, size] or [T, heads, size] has whole rows, and heads side by side."""
    return x.ndim in (2, 3) and x.stride(-1) == 1 and (x.ndim == 2 or x.stride(1) == x.shape[2])


def plain(x: torch.Tensor, y: torch.Tensor | None, w: torch.Tensor, eps: float, kind: str) -> Any:
    """What `add_norm` computes, in torch."""
    total = x if y is None else x + y
    h = total.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if kind == "plain":
        return total, h.to(x.dtype) * w
    return total, (h * (w.float() + (kind == "offset"))).to(x.dtype)


def add_norm(
    x: torch.Tensor, y: torch.Tensor | None, w: torch.Tensor, eps: float, kind: str = "plain"
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, size] or [T, heads, size], y alike or None, w [size] -> (x + y rounded to their dtype, its norm times w).

    Squares are summed in float32. kind: how the weight is applied, a key of KINDS. Without y the sum is x itself.
    """
    heads, size = (1 if x.ndim == 2 else x.shape[1]), x.shape[-1]
    rows = x.shape[0] * heads
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if y is None else torch.empty_like(out)
    block = triton.next_power_of_2(size)
    some = max(1, TILE // block)
    if rows:
        _norm[(triton.cdiv(rows, some),)](
            x,
            x if y is None else y,
            w,
            total,
            out,
            rows,
            x.stride(0),
            (x if y is None else y).stride(0),
            eps,
            heads=heads,
            size=size,
            BLOCK=block,
            SOME=some,
            KIND=KINDS[kind],
            ADD=y is not None,
            num_warps=min(8, max(1, block * some // 512)),
            **options(x),
        )
    return total, out


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x,
    y,
    w,
    total,
    out,
    rows,
    x_stride,
    y_stride,
    eps,
    heads: tl.constexpr,
    size: tl.constexpr,
    BLOCK: tl.constexpr,
    SOME: tl.constexpr,
    KIND: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    ready(OVERLAP)
    row = (tl.program_id(0) * SOME + tl.arange(0, SOME)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    weight = tl.load(w + column, mask=column < size, other=0.0)[None, :]
    wait(OVERLAP)
    place = (row % heads) * size
    h = tl.load(x + (row // heads * x_stride + place)[:, None] + column[None, :], mask=inside, other=0.0)
    flat = row[:, None] * size + column[None, :]
    kind = h.dtype
    if ADD:
        more = tl.load(y + (row // heads * y_stride + place)[:, None] + column[None, :], mask=inside, other=0.0)
        h = (h.to(tl.float32) + more.to(tl.float32)).to(kind)
        tl.store(total + flat, h, mask=inside)
    h = h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, 1) / size + eps)
    h = h * scale[:, None]
    if KIND == 0:
        normed = (h.to(kind).to(tl.float32) * weight.to(tl.float32)).to(kind)
    elif KIND == 1:
        normed = (h * weight.to(tl.float32)).to(kind)
    else:
        normed = (h * (1.0 + weight.to(tl.float32))).to(kind)
    tl.store(out + flat, normed, mask=inside)
