"""Tokens from logits without sorting a vocabulary: the rules of docs/sampling.md, row by row, on the device.

Filters cut at a distance from the largest value, which kernels_cuda.cut finds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels_cuda.cut import bits, edges, scaled

SPLIT = 8192
"""Entries of a row that one program looks at."""
BLOCK = 1024


class Filters(NamedTuple):
    """How each row draws. temperature float64[R]: 0 takes the largest. top_k int64[R]: the vocabulary is off. top_p and
    min_p float64[R]: 1 and 0 are off. top_k, top_p: None where no row has it. seed int64[R, 2]: high and low word.
    position int64[R]: of the token made."""

    temperature: torch.Tensor
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    min_p: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor


def supports(logits: Any) -> str:
    """Why the kernel is not for logits [R, V]; "" where it is."""
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{logits.dtype}"
    return "" if logits.stride(1) == 1 else "rows whose entries do not lie side by side"


def sample(logits: torch.Tensor, filters: Filters | None = None) -> torch.Tensor:
    """logits [R, V] -> int64[2, R]: a token for each row, and 1 where all its logits are finite.

    Without filters, or where a temperature is 0: the largest, ties to the lowest id.
    """
    rows, vocab = logits.shape
    out = torch.empty((2, rows), dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    parts = triton.cdiv(vocab, SPLIT)
    fresh = lambda kind, *shape: torch.empty(shape, dtype=kind, device=logits.device)  # noqa: E731
    peak, low = fresh(torch.float32, rows, parts), fresh(torch.float32, rows, parts)
    place, sound = fresh(torch.int32, 2, rows, parts)
    size = {"vocab": vocab, "PARTS": triton.next_power_of_2(parts), "parts": parts}
    stride = logits.stride(0)
    wide = {"SPLIT": SPLIT, "BLOCK": BLOCK, "num_warps": 8}
    cut = filters is not None and (filters.top_k is not None or filters.top_p is not None)
    _largest[(rows, parts)](logits, stride, peak, low, place, sound, vocab=vocab, parts=parts, LOW=cut, **wide)
    high = fresh(torch.float32, rows)
    _join[(rows,)](peak, place, sound, high, out, rows, FIRST=True, num_warps=1, **size)
    if filters is None:
        return out
    edge = edges(logits, high, low, filters.temperature, filters.top_k, filters.top_p)
    noisy = (filters.temperature, filters.min_p, filters.seed, filters.position)
    _noisy[(rows, parts)](logits, stride, high, edge, *noisy, peak, place, vocab=vocab, parts=parts, **wide)
    _join[(rows,)](peak, place, filters.temperature, high, out, rows, FIRST=False, num_warps=1, **size)
    return out


@triton.jit(do_not_specialize_on_alignment=["sound"])
def _largest(
    logits,
    stride,
    peak,
    low,
    place,
    sound,
    vocab: tl.constexpr,
    parts: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    LOW: tl.constexpr,
):
    """The largest of a part of a row, where it is, the lowest that is finite where that is asked for, and whether all
    of it is."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = tl.zeros((BLOCK,), tl.int32)
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    odd = tl.zeros((BLOCK,), tl.int32)
    for i in range(0, SPLIT, BLOCK):
        token = part * SPLIT + i + column
        x = tl.load(logits + row * stride + token, mask=token < vocab, other=0.0).to(tl.float32)
        finite = (x - x) == 0
        odd |= tl.where(finite, 0, 1)
        if LOW:
            least = tl.minimum(least, tl.where(finite & (token < vocab), x, float("inf")))
        x = tl.where(token < vocab, x, float("-inf"))
        more = x > best
        best, at = tl.where(more, x, best), tl.where(more, token, at)
    most = tl.max(best, 0)
    first = tl.min(tl.where(best == most, at, 2147483647), 0)
    here = row * parts + part
    tl.store(peak + here, most)
    if LOW:
        tl.store(low + here, tl.min(least, 0))
    tl.store(place + here, tl.where(first < vocab, first, 0))
    tl.store(sound + here, 1 - tl.max(odd, 0))


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["more"])
def _join(
    peak,
    place,
    more,
    high,
    out,
    rows,
    vocab: tl.constexpr,
    parts: tl.constexpr,
    PARTS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """The parts of a row joined. First: its largest value and whether it is finite, which its parts say in `more`;
    then: tokens of rows that draw, whose temperature, `more`, is above 0."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    inside = part < parts
    value = tl.load(peak + row * parts + part, mask=inside, other=float("-inf"))
    token = tl.load(place + row * parts + part, mask=inside, other=2147483647)
    most = tl.max(value, 0)
    first = tl.min(tl.where(inside & (value == most), token, 2147483647), 0)
    first = tl.where(first < vocab, first, 0).to(tl.int64)
    if FIRST:
        tl.store(high + row, most)
        tl.store(out + row, first)
        tl.store(out + rows + row, tl.min(tl.load(more + row * parts + part, mask=inside, other=1), 0).to(tl.int64))
    else:
        if tl.load(more + row) > 0:
            tl.store(out + row, first)


@triton.jit
def _turned(x0, x1, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr):
    """Four rounds of threefry."""
    x0 = x0 + x1
    x1 = ((x1 << a) | (x1 >> (32 - a))) ^ x0
    x0 = x0 + x1
    x1 = ((x1 << b) | (x1 >> (32 - b))) ^ x0
    x0 = x0 + x1
    x1 = ((x1 << c) | (x1 >> (32 - c))) ^ x0
    x0 = x0 + x1
    x1 = ((x1 << d) | (x1 >> (32 - d))) ^ x0
    return x0, x1


@triton.jit
def _threefry(k0, k1, x0, x1):
    """threefry2x32 of 20 rounds, uint32."""
    k2 = k0 ^ k1 ^ 0x1BD11BDA
    x0, x1 = x0 + k0, x1 + k1
    x0, x1 = _turned(x0, x1, 13, 15, 26, 6)
    x0, x1 = x0 + k1, x1 + k2 + 1
    x0, x1 = _turned(x0, x1, 17, 29, 16, 24)
    x0, x1 = x0 + k2, x1 + k0 + 2
    x0, x1 = _turned(x0, x1, 13, 15, 26, 6)
    x0, x1 = x0 + k0, x1 + k1 + 3
    x0, x1 = _turned(x0, x1, 17, 29, 16, 24)
    x0, x1 = x0 + k1, x1 + k2 + 4
    x0, x1 = _turned(x0, x1, 13, 15, 26, 6)
    return x0 + k2, x1 + k0 + 5


@triton.jit(do_not_specialize_on_alignment=["temperatures", "min_p", "seed", "position"])
def _noisy(
    logits,
    stride,
    high,
    edges,
    temperatures,
    min_p,
    seed,
    position,
    peak,
    place,
    vocab: tl.constexpr,
    parts: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a part of a row that draws: the largest value with noise among what the filters keep, and where it is."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperatures + row).to(tl.float32)
    if temperature > 0:
        top, edge, floor = tl.load(high + row), tl.load(edges + row), tl.load(min_p + row)
        column = tl.arange(0, BLOCK)
        zero = tl.zeros((BLOCK,), tl.uint32)
        k0 = zero + tl.load(seed + 2 * row).to(tl.uint32)
        k1 = zero + tl.load(seed + 2 * row + 1).to(tl.uint32)
        k0, k1 = _threefry(k0, k1, zero, zero + tl.load(position + row).to(tl.uint32))
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        at = tl.full((BLOCK,), 2147483647, tl.int32)
        for i in range(0, SPLIT, BLOCK):
            token = part * SPLIT + i + column
            value = scaled(logits, stride, row, token, top, temperature, vocab)
            kept = (token < vocab) & (bits(value) <= edge)
            if floor > 0:
                kept = kept & (tl.exp(value.to(tl.float64)) >= floor)
            if tl.max(kept.to(tl.int32), 0) > 0:
                x0, x1 = _threefry(k0, k1, zero, token.to(tl.uint32))
                u = (((x0 ^ x1) >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
                value = tl.where(kept, value - tl.log(-tl.log(u)), float("-inf"))
                more = value > best
                best, at = tl.where(more, value, best), tl.where(more, token, at)
        most = tl.max(best, 0)
        first = tl.min(tl.where(best == most, at, 2147483647), 0)
        tl.store(peak + row * parts + part, most)
        tl.store(place + row * parts + part, first)
