"""Adds up what parts of a row's keys gave, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels_cuda.overlap import ready, wait


@triton.jit(do_not_specialize=("low", "high"), do_not_specialize_on_alignment=("first",))
def merge(
    part, stat, out, first, low, high,
    Q_HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, Q_HEADS) for the tokens of rows low .. high - 1; part, stat, out as in `paged`; SPLITS a power of
    two. A part that saw nothing has the peak -inf, and no sums."""
    ready(OVERLAP)
    wait(OVERLAP)
    token = tl.load(first + low) + tl.program_id(0)
    if token < tl.load(first + high):
        at = token.to(tl.int64) * Q_HEADS + tl.program_id(1)
        d = tl.arange(0, WIDE)
        i = tl.arange(0, SPLITS)
        flat = at * SPLITS + i
        peak = tl.load(stat + flat * 2)
        total = tl.load(stat + flat * 2 + 1)
        top = tl.max(peak, 0)
        weight = tl.exp2(peak - top)
        parts = tl.load(part + flat[:, None] * DIM + d[None, :], mask=(d < DIM)[None, :], other=0)
        some = (peak > -float("inf"))[:, None]  # not before the load, which would wait for it
        made = tl.sum(tl.where(some, parts * weight[:, None], 0.0), 0) / tl.sum(total * weight, 0)
        tl.store(out + at * DIM + d, made.to(out.dtype.element_ty), mask=d < DIM)
