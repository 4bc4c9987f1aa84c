"""One token through the experts that it chose, as fast as their matrices are read: no tensor cores, no sorting."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels_cuda.grouped_matmul import Matrices, _act, kind_of, pointers
from kernels_cuda.quantised_matmul import widen
from kernels_cuda.route import Plan

READ = 8192
"""Numbers of a matrix that a program reads at once."""


def shape(inner: int) -> tuple[int, int]:
    """Rows of gate and of up that a program has, and numbers of each that it reads at once."""
    return 2, min(2048, triton.next_power_of_2(inner))


def step(inner: int, top_k: int) -> int:
    """Numbers of a row of `down` that a program reads at once, of each chosen expert."""
    return min(max(128, READ // triton.next_power_of_2(top_k)), triton.next_power_of_2(inner))


def gated(
    x: torch.Tensor, gate: Matrices, up: Matrices, plan: Plan, clamp: tuple[float, float] | None = None
) -> torch.Tensor:
    """`grouped_matmul.gated` of x [1, hidden] -> [k, size]."""
    chosen = plan.chosen
    top_k, (columns, inner) = chosen.shape[1], gate.body.shape[1:]
    out = torch.empty((top_k, columns), dtype=x.dtype, device=x.device)
    some, width = shape(inner)
    alpha, limit = clamp or (0.0, 0.0)
    kind, scaled = kind_of(gate)
    _row_gated[(triton.cdiv(columns, some), top_k)](
        x.contiguous(), *pointers(gate, x), *pointers(up, x), chosen, out, alpha, limit, columns=columns, inner=inner,
        KIND=kind, SCALED=scaled, BIASED=gate.bias is not None, CLAMPED=clamp is not None, C=some, I=width, num_warps=4,
    )  # fmt: skip
    return out


def summed(h: torch.Tensor, down: Matrices, share: torch.Tensor, plan: Plan) -> torch.Tensor:
    """`grouped_matmul.summed` of h [k, size] -> [1, hidden]."""
    chosen = plan.chosen
    top_k, (columns, inner) = chosen.shape[1], down.body.shape[1:]
    out = torch.empty((1, columns), dtype=h.dtype, device=h.device)
    wide = triton.next_power_of_2(top_k)
    body, scale, _ = pointers(down, h)
    kind, scaled = kind_of(down)
    _row_summed[(columns,)](
        h, body, scale, share, chosen, out, columns=columns, inner=inner, KIND=kind, SCALED=scaled, TOP=top_k, K=wide,
        I=step(inner, top_k), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _numbers(at, scale, e, n, k, inside, columns, inner, KIND: tl.constexpr, SCALED: tl.constexpr):
    """Numbers of a matrix in float32, times the scales of their blocks. e, n, k: expert, row and column of each."""
    raw = tl.load(at, mask=inside, other=0)
    wide = raw.to(tl.float32) if KIND == "plain" else widen(raw, KIND)
    if SCALED == "block":
        down, across = (columns + 127) // 128, (inner + 127) // 128
        wide *= tl.load(scale + (e * down + n // 128) * across + k // 128, mask=inside, other=0.0)
    return wide


@triton.jit
def _row_gated(
    x, gate, gate_scale, gate_bias, up, up_scale, up_bias, chosen, out, alpha, limit,
    columns: tl.constexpr, inner: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
    CLAMPED: tl.constexpr, C: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """C outputs of one of the chosen."""
    n, choice = tl.program_id(0) * C + tl.arange(0, C), tl.program_id(1)
    e, live = tl.load(chosen + choice), n < columns
    line = (e.to(tl.int64) * columns + n) * inner
    one, two = tl.zeros((C, I), tl.float32), tl.zeros((C, I), tl.float32)
    for begin in range(0, inner, I):
        k = begin + tl.arange(0, I)
        inside = live[:, None] & (k < inner)[None, :]
        place = line[:, None] + k[None, :]
        part = tl.load(x + k, mask=k < inner, other=0.0).to(tl.float32)[None, :]
        row, column = n[:, None], k[None, :]
        one += part * _numbers(gate + place, gate_scale, e, row, column, inside, columns, inner, KIND, SCALED)
        two += part * _numbers(up + place, up_scale, e, row, column, inside, columns, inner, KIND, SCALED)
    y, z = tl.sum(one, 1), tl.sum(two, 1)
    if SCALED == "row":
        y *= tl.load(gate_scale + e * columns + n, mask=live, other=0.0)
        z *= tl.load(up_scale + e * columns + n, mask=live, other=0.0)
    if BIASED:
        y += tl.load(gate_bias + e * columns + n, mask=live, other=0.0).to(tl.float32)
        z += tl.load(up_bias + e * columns + n, mask=live, other=0.0).to(tl.float32)
    made = _act(y, z, alpha, limit, CLAMPED)
    tl.store(out + choice * columns + n, made.to(out.dtype.element_ty), mask=live)


@triton.jit
def _row_summed(
    h, w, scale, share, chosen, out,
    columns: tl.constexpr, inner: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr, TOP: tl.constexpr,
    K: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """One output: a row of each chosen expert's matrix."""
    n, j = tl.program_id(0), tl.arange(0, K)
    there = j < TOP
    e = tl.load(chosen + j, mask=there, other=0)
    by = tl.load(share + j, mask=there, other=0.0).to(tl.float32)
    line = (e.to(tl.int64) * columns + n) * inner
    acc = tl.zeros((K, I), tl.float32)
    for begin in range(0, inner, I):
        k = begin + tl.arange(0, I)
        inside = there[:, None] & (k < inner)[None, :]
        part = tl.load(h + j[:, None] * inner + k[None, :], mask=inside, other=0.0).to(tl.float32)
        place = w + line[:, None] + k[None, :]
        acc += part * _numbers(place, scale, e[:, None], n, k[None, :], inside, columns, inner, KIND, SCALED)
    y = tl.sum(acc, 1) * by
    if SCALED == "row":
        y *= tl.load(scale + e * columns + n, mask=there, other=0.0)
    tl.store(out + n, tl.sum(y, 0).to(out.dtype.element_ty))
