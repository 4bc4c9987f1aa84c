"""Rows of bfloat16 times a matrix of int8 or float8_e4m3fn, widened in registers: as fast as the bytes are read.

Up to WIDEST rows are multiplied by tensor cores, the matrix as the first operand; one alone is for `row`.
Numbers are exact in bfloat16, sums are float32, and scales come afterwards (of a row) or with each block's partial sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import triton
import triton.language as tl

By: TypeAlias = Literal["row", "block"]
"""What has a scale of its own: each row of the matrix, or each SIDE x SIDE of it."""
SIDE = 128
WIDEST = 64
"""Rows that a program multiplies; more are several programs, each of which reads the matrix."""
LEAST = 16
"""Bytes that a thread reads at once: the summed dimension is a multiple."""


PROGRAMS = 512
"""That a chip needs to read at full speed, half as many of WIDEST rows: where a product has fewer, several share its
sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """What a program has of the product: rows of x, of the matrix, and columns read at once.
    splits: programs that share the sum of one block; a kernel of its own adds what they have."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    splits: int = 1


def choose(rows: int, columns: int, inner: int, by: By) -> Blocks:
    """Blocks for x [rows, inner] times a matrix [columns, inner]."""
    m = next(size for size in (16, 32, WIDEST) if rows <= size or size == WIDEST)
    wide = 32 if m < WIDEST else 64
    programs = -(-columns // wide) * -(-rows // m)
    wanted = PROGRAMS if m < WIDEST else PROGRAMS // 2
    splits = max(1, min(8, wanted // programs, inner // (4 * SIDE)))
    stages = 3 if programs > PROGRAMS and m < WIDEST else 5
    return Blocks(rows=m, columns=wide, inner=SIDE, warps=wide // 16, stages=stages, splits=splits)


def supports(x: torch.Tensor, body: torch.Tensor) -> str:
    """Why x [T, in] can't be multiplied with a matrix [out, in]; "" where it can."""
    if x.dtype != torch.bfloat16:
        return f"rows of {x.dtype}; bfloat16 is multiplied"
    if body.dtype not in (torch.int8, torch.float8_e4m3fn):
        return f"matrices of {body.dtype}"
    if body.shape[1] % LEAST or not body.is_contiguous():
        return f"lines of {body.shape[1]} bytes; a multiple of {LEAST} is read"
    return ""


def quantised_matmul(
    x: torch.Tensor, body: torch.Tensor, scale: torch.Tensor, by: By, blocks: Blocks | None = None, native: bool = False
) -> torch.Tensor:
    """x [T, in] times body [out, in] and its scales -> [T, out] in x's dtype.

    scale: float32 [1, out], or [out / SIDE, in / SIDE] rounded up. native: the chip widens float8_e4m3fn itself; else
    its bits are moved to where float16 has them, which every chip can.
    """
    x, (rows, inner), columns = x.contiguous(), x.shape, body.shape[0]
    blocks = blocks or choose(rows, columns, inner, by)
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    kind = "int8" if body.dtype == torch.int8 else "native" if native else "bits"
    common: dict[str, Any] = {
        "KIND": kind,
        "BLOCKED": by == "block",
        "EVEN": inner % blocks.inner == 0,
        "C": blocks.columns,
        "I": blocks.inner,
        "num_warps": blocks.warps,
    }
    parts, width = triton.cdiv(columns, blocks.columns), scale.shape[-1]
    data = body.view(torch.uint8)
    shared = out
    if blocks.splits > 1:
        shared = torch.empty((blocks.splits, rows, columns), dtype=torch.float32, device=x.device)
    _few_rows[(parts, triton.cdiv(rows, blocks.rows), blocks.splits)](
        x,
        data,
        scale,
        shared,
        rows,
        columns,
        inner,
        width,
        triton.cdiv(inner, blocks.inner * blocks.splits) * blocks.inner,
        R=blocks.rows,
        WIDE=tl.bfloat16 if x.is_cuda else tl.float32,  # the interpreter multiplies no bfloat16
        num_stages=blocks.stages,
        **common,
    )
    if blocks.splits > 1:
        _add[(triton.cdiv(rows * columns, 1024),)](shared, out, rows * columns, blocks.splits, I=1024)
    return out


def widened(body: torch.Tensor, scale: torch.Tensor, by: By, native: bool = False) -> torch.Tensor:
    """body [out, in] times its scales -> bfloat16 [out, in], rounded: what a library multiplies many rows with."""
    columns, inner = body.shape
    out = torch.empty((columns, inner), dtype=torch.bfloat16, device=body.device)
    kind = "int8" if body.dtype == torch.int8 else "native" if native else "bits"
    grid = (columns, triton.cdiv(inner, 2048))
    _widen_line[grid](
        body.view(torch.uint8), scale, out, inner, scale.shape[-1], KIND=kind, BLOCKED=by == "block", I=2048
    )
    return out


@triton.jit
def _widen_line(w, scale, out, inner, width, KIND: tl.constexpr, BLOCKED: tl.constexpr, I: tl.constexpr):
    """I numbers of a row of the matrix."""
    n, k = tl.program_id(0), tl.program_id(1) * I + tl.arange(0, I)
    line, live = n.to(tl.int64) * inner, k < inner
    if BLOCKED:
        by = tl.load(scale + (n // 128) * width + k // 128, mask=live, other=0.0)
    else:
        by = tl.load(scale + n)
    number = widen(tl.load(w + line + k, mask=live, other=0), KIND) * by
    tl.store(out + line + k, number.to(out.dtype.element_ty), mask=live)


@triton.jit
def widen(raw, KIND: tl.constexpr):
    """uint8 bits -> float32 or bfloat16 of the same value, exactly. NaN is none that a matrix holds."""
    if KIND == "int8":
        return raw.to(tl.int8, bitcast=True).to(tl.float32)
    if KIND == "native":
        return raw.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    bits = raw.to(tl.int16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)  # the exponent's bias is 8 less: the value by 2^-8
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit(do_not_specialize=["rows"])  # or each kind of number would be compiled for
def _few_rows(
    x, w, scale, out, rows, columns, inner, width, share,
    KIND: tl.constexpr, BLOCKED: tl.constexpr, EVEN: tl.constexpr, C: tl.constexpr, I: tl.constexpr, R: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """C outputs of R rows, summed over `share` numbers of each; out [splits, rows, columns]. I is 128 where blocks have
    scales. WIDE: dtype that is multiplied in."""
    first, split = tl.program_id(0) * C, tl.program_id(2)
    n, m = first + tl.arange(0, C), tl.program_id(1) * R + tl.arange(0, R)
    live, there = n < columns, m < rows
    start, from_ = w + n.to(tl.int64)[:, None] * inner, x + m.to(tl.int64)[None, :] * inner
    acc = tl.zeros((C, R), tl.float32)
    for at in range(split * share, tl.minimum((split + 1) * share, inner), I):
        k = at + tl.arange(0, I)
        if EVEN:
            raw = tl.load(start + k[None, :], mask=live[:, None], other=0)
            part = tl.load(from_ + k[:, None], mask=there[None, :], other=0.0)
        else:
            raw = tl.load(start + k[None, :], mask=live[:, None] & (k < inner)[None, :], other=0)
            part = tl.load(from_ + k[:, None], mask=there[None, :] & (k < inner)[:, None], other=0.0)
        wide, part = widen(raw, KIND).to(WIDE), part.to(WIDE)
        if BLOCKED:
            acc += tl.dot(wide, part) * tl.load(scale + (first // 128) * width + at // 128)
        else:
            acc = tl.dot(wide, part, acc)
    if not BLOCKED:
        acc *= tl.load(scale + n, mask=live, other=0.0)[:, None]
    where = out + (split.to(tl.int64) * rows + m)[None, :] * columns + n[:, None]
    tl.store(where, acc.to(out.dtype.element_ty), mask=there[None, :] & live[:, None])


@triton.jit(do_not_specialize=["splits"])
def _add(shared, out, size, splits, I: tl.constexpr):
    """shared float32 [splits, size] -> out [size], its sums, always in one order."""
    at = tl.program_id(0) * I + tl.arange(0, I)
    total = tl.zeros((I,), tl.float32)
    for split in range(splits):
        total += tl.load(shared + tl.cast(split, tl.int64) * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)
