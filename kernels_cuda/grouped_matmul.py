"""Rows times the matrices of the experts that they chose: gate, up and activation at once, then down and the sum.

The matrix is the first operand, so that one form serves few rows, where its bytes count, and many. Sums are float32.
Each choice has a line of its own, and a token's are added in the order of its choices: no result depends on who comes
first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl

from kernels_cuda.attention import arch_of
from kernels_cuda.quantised_matmul import widen
from kernels_cuda.route import Plan

By: TypeAlias = Literal["row", "block"]
"""What has a scale of its own: each row of a matrix, or each SIDE x SIDE of it."""
SIDE = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EIGHT = (torch.int8, torch.float8_e4m3fn)
NAMES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
BLOCK = 1024
"""Numbers of a token that are summed by a program."""


class Matrices(NamedTuple):
    """Of all experts: body [E, out, in]; where it is of 8 bits float32 scales [E, 1, out], or [E, out / SIDE,
    in / SIDE] rounded up; bias [E, out]. native: the chip widens float8_e4m3fn itself."""

    body: torch.Tensor
    scale: torch.Tensor | None = None
    by: By = "row"
    bias: torch.Tensor | None = None
    native: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """What a program has of a product: rows of the matrix, summed numbers in one turn; tiles of rows that go through a
    block of the matrix one after the other, while it is in the cache."""

    columns: int
    inner: int
    warps: int
    stages: int
    group: int = 1


GATED = {
    16: Blocks(columns=32, inner=128, warps=4, stages=4),
    32: Blocks(columns=32, inner=128, warps=4, stages=4),
    64: Blocks(columns=64, inner=64, warps=4, stages=4),
    128: Blocks(columns=128, inner=64, warps=8, stages=4, group=8),
}
"""Rows of a tile -> blocks of the product with two matrices of 16 bits."""
DOWN = {
    16: Blocks(columns=32, inner=128, warps=4, stages=5),
    32: Blocks(columns=64, inner=128, warps=4, stages=4),
    64: Blocks(columns=128, inner=64, warps=4, stages=4),
    128: Blocks(columns=128, inner=64, warps=8, stages=4, group=8),
}
"""The same of one."""


def choose(rows: int, two: bool, dtype: torch.dtype, arch: str) -> Blocks:
    """Blocks for tiles of so many rows of a dtype. two: matrices. arch: sm_90, gfx942."""
    made = (GATED if two else DOWN)[rows]
    if dtype == torch.float32:  # multiplied without tensor cores
        return Blocks(columns=16 if rows == 128 else 32, inner=32, warps=4, stages=2)
    most = 2 if arch.startswith("gfx") else 3 if arch.startswith("sm_8") else 9
    columns = min(made.columns, 64 if most < 9 else 128)  # of 8 bits more would spill there
    return Blocks(columns=columns, inner=made.inner, warps=made.warps, stages=min(made.stages, most), group=made.group)


def supports(x: Any, w: Matrices) -> str:
    """Why rows like x can't be multiplied with experts' matrices; "" where they can."""
    if x.dtype not in DTYPES:
        return f"rows of {x.dtype}"
    if w.body.dtype != x.dtype and w.body.dtype not in EIGHT:
        return f"{x.dtype} times {w.body.dtype}"
    if not w.body.is_contiguous():
        return "matrices that do not lie side by side"
    return ""


def kind_of(w: Matrices) -> tuple[str, str]:
    """How a number becomes wide, and what has a scale."""
    if w.scale is None:
        return "plain", ""
    return ("int8" if w.body.dtype == torch.int8 else "native" if w.native else "bits"), w.by


def pointers(w: Matrices, absent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Body, scale and bias as a kernel takes them."""
    body = w.body if w.scale is None else w.body.view(torch.uint8)
    return body, absent if w.scale is None else w.scale, absent if w.bias is None else w.bias


def gated(
    x: torch.Tensor, gate: Matrices, up: Matrices, plan: Plan, clamp: tuple[float, float] | None = None
) -> torch.Tensor:
    """x [T, hidden] -> act(gate(x)) * up(x) of each choice, [T*k, size], in the plan's order.

    The act is silu; clamp (alpha, limit): (up + 1) * gate * sigmoid(alpha * gate) of clamped gate and up.
    """
    assert plan.order is not None
    assert plan.tiles is not None
    (columns, inner), top_k = gate.body.shape[1:], plan.chosen.shape[1]
    out = torch.empty((plan.order.shape[0], columns), dtype=x.dtype, device=x.device)
    slots, (alpha, limit) = plan.tiles.shape[1], clamp or (0.0, 0.0)
    grid, constants = _launch(x, gate, plan.rows, True, slots)
    _gate_up[grid](
        x.contiguous(), *pointers(gate, x), *pointers(up, x), plan.order, plan.tiles, out, slots, alpha, limit,
        columns=columns, inner=inner, TOP=top_k, BIASED=gate.bias is not None, CLAMPED=clamp is not None, **constants,
    )  # fmt: skip
    return out


def summed(h: torch.Tensor, down: Matrices, share: torch.Tensor, plan: Plan) -> torch.Tensor:
    """h [T*k, size] in the plan's order, through `down`, summed by the choices' shares [T, k] -> [T, hidden]."""
    assert plan.order is not None
    assert plan.tiles is not None
    (columns, inner), (tokens, top_k) = down.body.shape[1:], share.shape
    each = torch.empty((tokens * top_k, columns), dtype=h.dtype, device=h.device)
    out = torch.empty((tokens, columns), dtype=h.dtype, device=h.device)
    slots, (body, scale, _) = plan.tiles.shape[1], pointers(down, h)
    grid, constants = _launch(h, down, plan.rows, False, slots)
    _down[grid](
        h, body, scale, share, plan.order, plan.tiles, each, tokens * top_k, slots,
        columns=columns, inner=inner, **constants,
    )  # fmt: skip
    _sum[(tokens, triton.cdiv(columns, BLOCK))](each, out, columns=columns, TOP=top_k, BLOCK=BLOCK, num_warps=4)
    return out


def _launch(x: torch.Tensor, w: Matrices, rows: int, two: bool, slots: int) -> tuple[tuple[int], dict[str, Any]]:
    """Programs of a product, and what they are compiled for."""
    columns, inner = w.body.shape[1:]
    b, (kind, scaled) = choose(rows, two, x.dtype, arch_of(x.device)), kind_of(w)
    constants = {
        "KIND": kind,
        "SCALED": scaled,
        "EVEN": inner % b.inner == 0,
        "R": rows,
        "C": b.columns,
        "I": b.inner,
        "GROUP": b.group,
        "WIDE": NAMES[x.dtype] if x.is_cuda else tl.float32,  # the interpreter multiplies no bfloat16
        "num_warps": b.warps,
        "num_stages": b.stages,
    }
    return (slots * triton.cdiv(columns, b.columns),), constants


@triton.jit
def _where(slots, columns, C: tl.constexpr, GROUP: tl.constexpr):
    """The tile and the first column of a program."""
    at, across = tl.program_id(0), tl.cdiv(columns, C)
    band = at // (GROUP * across)
    high = tl.minimum(slots - band * GROUP, GROUP)
    return band * GROUP + (at % (GROUP * across)) % high, (at % (GROUP * across)) // high * C


@triton.jit
def _add(
    acc, w, scale, part, line, e, first, k, begin, columns, inner,
    KIND: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """acc [C, R] and the product of numbers begin .. of the matrix's lines with `part`."""
    if EVEN:
        raw = tl.load(w + line[:, None] + k[None, :])
    else:
        raw = tl.load(w + line[:, None] + k[None, :], mask=(k < inner)[None, :], other=0)
    wide = raw.to(WIDE) if KIND == "plain" else widen(raw, KIND).to(WIDE)
    if SCALED == "block":
        down, across = (columns + 127) // 128, (inner + 127) // 128
        by = tl.load(scale + (e * down + first // 128) * across + begin // 128)
        return acc + tl.dot(wide, part, input_precision="ieee") * by
    return tl.dot(wide, part, acc, input_precision="ieee")


@triton.jit
def _act(gate, up, alpha, limit, CLAMPED: tl.constexpr):
    """silu(gate) * up, or what `gated` says of clamped ones."""
    if CLAMPED:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
        return (up + 1.0) * (gate / (1.0 + tl.exp(-alpha * gate)))
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["slots"])
def _gate_up(
    x, gate, gate_scale, gate_bias, up, up_scale, up_bias, order, tiles, out, slots, alpha, limit,
    columns: tl.constexpr, inner: tl.constexpr, TOP: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr,
    BIASED: tl.constexpr, CLAMPED: tl.constexpr, EVEN: tl.constexpr, R: tl.constexpr, C: tl.constexpr, I: tl.constexpr,
    GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """C outputs of the rows of a tile."""
    slot, first = _where(slots, columns, C, GROUP)
    count = tl.load(tiles + 2 * slots + slot)
    if count > 0:
        e, begin = tl.load(tiles + slot), tl.load(tiles + slots + slot)
        m, n = tl.arange(0, R), first + tl.arange(0, C)
        there, live = m < count, n < columns
        row = tl.load(order + begin + m, mask=there, other=0) // TOP
        line = (e.to(tl.int64) * columns + tl.minimum(n, columns - 1)) * inner  # past the end: read, never written
        from_ = x + row.to(tl.int64)[None, :] * inner
        one, two = tl.zeros((C, R), tl.float32), tl.zeros((C, R), tl.float32)
        for at in range(0, inner, I):
            k = at + tl.arange(0, I)
            if EVEN:
                part = tl.load(from_ + k[:, None]).to(WIDE)
            else:
                part = tl.load(from_ + k[:, None], mask=(k < inner)[:, None], other=0.0).to(WIDE)
            one = _add(one, gate, gate_scale, part, line, e, first, k, at, columns, inner, KIND, SCALED, EVEN, WIDE)
            two = _add(two, up, up_scale, part, line, e, first, k, at, columns, inner, KIND, SCALED, EVEN, WIDE)
        if SCALED == "row":
            one *= tl.load(gate_scale + e * columns + n, mask=live, other=0.0)[:, None]
            two *= tl.load(up_scale + e * columns + n, mask=live, other=0.0)[:, None]
        if BIASED:
            one += tl.load(gate_bias + e * columns + n, mask=live, other=0.0).to(tl.float32)[:, None]
            two += tl.load(up_bias + e * columns + n, mask=live, other=0.0).to(tl.float32)[:, None]
        made = tl.trans(_act(one, two, alpha, limit, CLAMPED).to(out.dtype.element_ty))
        to = out + (begin + m).to(tl.int64)[:, None] * columns + n[None, :]
        tl.store(to, made, mask=there[:, None] & live[None, :])


@triton.jit(do_not_specialize=["choices", "slots"])
def _down(
    h, w, scale, share, order, tiles, out, choices, slots,
    columns: tl.constexpr, inner: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, I: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """C outputs of the rows of a tile, times their shares, each to the line of its choice."""
    slot, first = _where(slots, columns, C, GROUP)
    count = tl.load(tiles + 2 * slots + slot)
    if count > 0:
        e, begin = tl.load(tiles + slot), tl.load(tiles + slots + slot)
        m, n = tl.arange(0, R), first + tl.arange(0, C)
        there, live = m < count, n < columns
        line = (e.to(tl.int64) * columns + tl.minimum(n, columns - 1)) * inner
        from_ = h + tl.minimum(begin + m, choices - 1).to(tl.int64)[None, :] * inner
        acc = tl.zeros((C, R), tl.float32)
        for at in range(0, inner, I):
            k = at + tl.arange(0, I)
            if EVEN:
                part = tl.load(from_ + k[:, None]).to(WIDE)
            else:
                part = tl.load(from_ + k[:, None], mask=(k < inner)[:, None], other=0.0).to(WIDE)
            acc = _add(acc, w, scale, part, line, e, first, k, at, columns, inner, KIND, SCALED, EVEN, WIDE)
        if SCALED == "row":
            acc *= tl.load(scale + e * columns + n, mask=live, other=0.0)[:, None]
        choice = tl.load(order + begin + m, mask=there, other=0)
        acc *= tl.load(share + choice, mask=there, other=0.0).to(tl.float32)[None, :]
        to = out + choice.to(tl.int64)[:, None] * columns + n[None, :]
        tl.store(to, tl.trans(acc.to(out.dtype.element_ty)), mask=there[:, None] & live[None, :])


@triton.jit
def _sum(each, out, columns: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK numbers of a token: its choices, the first first."""
    token, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(TOP):
        total += tl.load(each + (token * TOP + i) * columns + n, mask=n < columns, other=0.0).to(tl.float32)
    tl.store(out + token * columns + n, total.to(out.dtype.element_ty), mask=n < columns)
