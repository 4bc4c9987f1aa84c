"""Rows times a matrix of int8 or float8_e4m3fn: decoding reads half the bytes of bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.chip import Chip, chip
from kernels_pallas.product import SIDE, By, Turn, accumulate, blocks_of, budget, mixed, padded

Line: TypeAlias = tuple[int, int, int, Turn]


def _turn(columns: int, depth: int, across: int, part: int) -> Turn:
    return Turn(columns=columns, depth=depth, across=across, part=part)


V5: dict[By, tuple[Line, ...]] = {
    "row": ((128, 128, 256, _turn(256, 2048, 256, 512)), (1 << 30, 512, 512, _turn(512, 1024, 256, 256))),
    "block": (
        (64, 64, 256, _turn(128, 4096, 128, 128)),
        (128, 128, 256, _turn(256, 2048, 128, 512)),
        (1 << 30, 512, 512, _turn(512, 1024, 256, 128)),
    ),
}
V6E: dict[By, tuple[Line, ...]] = {
    "row": (
        (64, 64, 256, _turn(256, 1024, 256, 1024)),
        (128, 128, 512, _turn(512, 1024, 256, 256)),
        (1 << 30, 512, 512, _turn(512, 2048, 256, 512)),
    ),
    "block": (
        (64, 64, 256, _turn(128, 4096, 128, 1024)),
        (128, 128, 256, _turn(256, 2048, 128, 512)),
        (1 << 30, 512, 512, _turn(512, 1024, 256, 128)),
    ),
}
V7X: dict[By, tuple[Line, ...]] = {
    "row": ((128, 128, 512, _turn(512, 4096, 256, 512)), (1 << 30, 512, 512, _turn(512, 2048, 256, 512))),
    "block": (
        (64, 64, 512, _turn(256, 4096, 256, 4096)),
        (128, 128, 512, _turn(512, 1024, 256, 128)),
        (1 << 30, 512, 512, _turn(512, 1024, 256, 128)),
    ),
}
HERE: tuple[Line, ...] = ((1 << 30, 32, 128, _turn(128, 128, 128, 128)),)
BLOCKS: dict[str, dict[By, tuple[Line, ...]]] = {
    "v5e": V5,
    "v5p": V5,
    "v6e": V6E,
    "7x": V7X,
    "interpreted": {"row": HERE, "block": HERE},
}
"""Chip -> what has a scale -> (rows, up to which; rows of a block; columns of a block; a turn), the first that holds.
Turns are as large as spill no registers: `radixmesh bench kernels` shows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """rows, columns: of the product in one block; columns are rows of the matrix. The summed dimension is whole."""

    rows: int
    columns: int
    turn: Turn


def vmem(blocks: Blocks, inner: int, x: Any, w: Any) -> int:
    """Bytes of VMEM that blocks take, each twice, as the next comes while one is multiplied; and the product in
    float32. x, w: dtypes."""
    m, n = blocks.rows, blocks.columns
    held = padded(m, inner, x) + padded(n, inner, w) + padded(m, n, x) + padded(1, n, jnp.float32)
    return 2 * held + padded(m, blocks.turn.columns, jnp.float32)


def choose(on: Chip, rows: int, columns: int, inner: int, x: Any, w: Any, by: By = "row") -> Blocks:
    """Blocks for a chip and shape: those of BLOCKS, halved where the summed dimension is so long that they would not
    fit."""
    _, m, n, turn = next(line for line in BLOCKS[on.name][by] if rows <= line[0])
    m, n = min(m, -(-rows // 16) * 16), min(n, blocks_of(columns) * SIDE)

    turn = turn.exact() if jnp.dtype(x) == jnp.float32 else turn

    def made() -> Blocks:
        return Blocks(rows=m, columns=n, turn=turn.fit(n, inner))

    while vmem(made(), inner, x, w) > budget(on) and (n > SIDE or m > 16):
        m, n = (m, max(SIDE, n // 2 // SIDE * SIDE)) if n > SIDE else (m // 2 // 16 * 16, n)
    return made()


def supports(
    on: Chip, rows: int, columns: int, inner: int, x: Any, w: Any, blocks: Blocks | None = None, by: By = "row"
) -> str:
    """Why a call can't be made, "" where it can. x: dtype of the rows; w: of the matrix."""
    why = mixed(x, w, scaled=True)
    if why:
        return why
    blocks = blocks or choose(on, rows, columns, inner, x, w, by)
    if blocks.columns % SIDE or blocks.columns % blocks.turn.columns:
        return f"blocks of {blocks.columns} columns; a multiple of {SIDE} and of a turn is computed"
    need = vmem(blocks, inner, x, w)
    if need > budget(on):
        return (
            f"blocks of {blocks.rows} x {blocks.columns} x {inner} take {need} bytes of VMEM, {on.name} has {on.vmem}"
        )
    lines = blocks_of(columns) * blocks_of(blocks_of(inner)) * SIDE * 8  # bytes, twice
    if lines > on.smem // 2:
        return f"the scales of {columns} x {inner} take {lines} bytes of SMEM, {on.name} has {on.smem}"
    return ""


def cost_estimate(rows: int, columns: int, inner: int, x: Any, w: Any) -> pl.CostEstimate:
    """Of a call."""
    a, b = jnp.dtype(x).itemsize, jnp.dtype(w).itemsize
    return pl.CostEstimate(
        flops=2 * rows * columns * inner,
        bytes_accessed=rows * (inner + columns) * a + columns * inner * b,
        transcendentals=0,
    )


def _kernel(layer: Any, x: Any, w: Any, scale: Any, out: Any, total: Any, *, by: By, turn: Turn) -> None:
    """One block of the product."""

    def keep(at: Any) -> None:
        y = total[...] * scale[:, at] if by == "row" else total[...]
        out[:, at] = y.astype(out.dtype)

    if by == "block":
        accumulate(total, x, w, turn, keep, scale, pl.program_id(0) * (out.shape[1] // SIDE))
    else:
        accumulate(total, x, w, turn, keep)


def quantised_matmul(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    by: By = "row",
    layer: jax.Array | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """x times a matrix whose numbers are w times their scales, summed in float32 -> [T, out] in x's dtype.

    x [T, in], bfloat16 or float32; w [out, in], int8 or float8_e4m3fn; the scale of each row of the matrix,
    float32[1, out], or of each 128 x 128, float32[out / 128, in / 128], rounded up; `by` says which.
    layer int32[]: w is [L, out, in], scale likewise, and this one of them is read, where it lies.
    interpret: as pallas_call has it. Raises ValueError for what `supports` refuses.
    """
    if layer is None:
        w, scale, layer = w[None], scale[None], jnp.zeros((), jnp.int32)
    (count, inner), columns, on = x.shape, w.shape[1], chip()
    blocks = blocks or choose(on, count, columns, inner, x.dtype, w.dtype, by)
    why = supports(on, count, columns, inner, x.dtype, w.dtype, blocks)
    if why:
        raise ValueError(f"quantised_matmul: {why}")
    m, n = blocks.rows, blocks.columns
    scales = pl.BlockSpec((None, 1, n), lambda j, i, layer: (layer[0], 0, j))
    if by == "block":
        scales = pl.BlockSpec((None, *scale.shape[1:]), lambda j, i, layer: (layer[0], 0, 0), memory_space=pltpu.SMEM)
    return pl.pallas_call(
        partial(_kernel, by=by, turn=blocks.turn),
        out_shape=jax.ShapeDtypeStruct((count, columns), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(-(-columns // n), -(-count // m)),
            in_specs=[
                pl.BlockSpec((m, inner), lambda j, i, layer: (i, 0)),
                pl.BlockSpec((None, n, inner), lambda j, i, layer: (layer[0], j, 0)),
                scales,
            ],
            out_specs=pl.BlockSpec((m, n), lambda j, i, layer: (i, j)),
            scratch_shapes=[pltpu.VMEM((m, blocks.turn.columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=on.vmem - on.vmem // 16,
        ),
        cost_estimate=cost_estimate(count, columns, inner, x.dtype, w.dtype),
        interpret=interpret,
        name="quantised_matmul",
    )(layer.reshape(1).astype(jnp.int32), x, w, scale)
