"""Rows sorted by group times a matrix of each group: the experts of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.chip import Chip, chip
from kernels_pallas.product import SIDE, By, Turn, accumulate, at, blocks_of, budget, mixed, padded, repeat

Line: TypeAlias = tuple[int, int, int, Turn]


def _turn(columns: int, depth: int, across: int, part: int, kept: int = 32) -> Turn:
    return Turn(columns=columns, depth=depth, across=across, part=part, kept=kept)


V5: dict[By, tuple[Line, ...]] = {
    "row": ((16, 32, 2048, _turn(2048, 1024, 256, 1024)), (1 << 30, 128, 2048, _turn(2048, 1024, 256, 256))),
    "block": ((16, 32, 2048, _turn(768, 2048, 128, 128, 16)), (1 << 30, 128, 2048, _turn(768, 2048, 128, 256))),
}
V5P: dict[By, tuple[Line, ...]] = V5 | {
    "block": (V5["block"][0], (1 << 30, 160, 2048, _turn(768, 2048, 128, 256))),
}
V6E: dict[By, tuple[Line, ...]] = {
    "row": (
        (16, 32, 2048, _turn(2048, 1024, 256, 1024)),
        (64, 128, 2048, _turn(2048, 1024, 256, 256)),
        (1 << 30, 256, 2048, _turn(2048, 1024, 256, 256)),
    ),
    "block": ((16, 32, 2048, _turn(768, 2048, 128, 512)), (1 << 30, 128, 2048, _turn(768, 1024, 128, 256))),
}
V7X: dict[By, tuple[Line, ...]] = {
    "row": (
        (16, 32, 2048, _turn(2048, 2048, 256, 2048, 256)),
        (64, 128, 2048, _turn(2048, 2048, 256, 2048, 256)),
        (1 << 30, 256, 2048, _turn(2048, 2048, 256, 2048, 256)),
    ),
    "block": ((16, 32, 2048, _turn(768, 2048, 256, 2048)), (1 << 30, 256, 2048, _turn(768, 1024, 256, 128))),
}
HERE: tuple[Line, ...] = ((1 << 30, 16, 128, _turn(128, 128, 128, 128, 16)),)
BLOCKS: dict[str, dict[By, tuple[Line, ...]]] = {
    "v5e": V5,
    "v5p": V5P,
    "v6e": V6E,
    "7x": V7X,
    "interpreted": {"row": HERE, "block": HERE},
}
"""Chip -> what has a scale, "row" where nothing has -> (rows of a group on average, up to which; rows of a block;
columns of a block; a turn), the first that holds. Turns are as large as spill no registers."""

CORES = {"v5p": 2}
"""Cores that share a call's blocks of columns, where they are more than one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """rows: of the product in one block; columns: of the product, rows of a matrix. The summed dimension is whole."""

    rows: int
    columns: int
    turn: Turn


class Visits(NamedTuple):
    """Which block of rows meets which group, in order. group, tile int32[visits]; starts int32[groups + 1]: the first
    row of each; count int32[]: how many visits there are. Those past it repeat the last."""

    group: jax.Array
    tile: jax.Array
    starts: jax.Array
    count: jax.Array


def visits(sizes: jax.Array, rows: int, tile: int) -> Visits:
    """Every block of `tile` rows meets each group that has rows in it; a group without rows is met by none.

    sizes int32[groups]: rows of each group. rows: of all.
    """
    tiles, groups = -(-rows // tile), sizes.shape[0]
    ends = jnp.cumsum(sizes).astype(jnp.int32)
    first = (ends - sizes) // tile
    met = jnp.where(sizes > 0, (ends - 1) // tile - first + 1, 0)
    until = jnp.cumsum(met)
    i = jnp.minimum(jnp.arange(min(tiles + groups - 1, rows)), jnp.maximum(until[-1] - 1, 0)).astype(jnp.int32)
    # sums over [visits, groups] instead of searches and look-ups, which cost a TPU more than all else here
    group = jnp.minimum((until[None] <= i[:, None]).sum(1, dtype=jnp.int32), groups - 1)
    mine = group[:, None] == jnp.arange(groups)[None]
    at = i + jnp.where(mine, (first - until + met)[None], 0).sum(1, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    return Visits(group, jnp.clip(at, 0, tiles - 1), starts, until[-1].astype(jnp.int32))


def vmem(blocks: Blocks, inner: int, x: Any, w: Any) -> int:
    """Bytes of VMEM that blocks take, each twice, as the next comes while one is multiplied; and the product in
    float32. x, w: dtypes."""
    m, n = blocks.rows, blocks.columns
    held = padded(m, inner, x) + padded(n, inner, w) + padded(m, n, x) + padded(1, n, jnp.float32)
    return 2 * held + padded(m, blocks.turn.columns, jnp.float32)


def choose(on: Chip, rows: int, groups: int, columns: int, inner: int, x: Any, w: Any, by: By = "row") -> Blocks:
    """Blocks for a chip and shape: those of BLOCKS, with fewer columns where the summed dimension is so long that they
    would not fit."""
    each = rows / groups
    _, m, n, turn = next(line for line in BLOCKS[on.name][by] if each <= line[0])
    m, n = min(m, -(-rows // 16) * 16), min(n, blocks_of(-(-columns // CORES.get(on.name, 1))) * SIDE)

    turn = turn.exact() if jnp.dtype(x) == jnp.float32 else turn

    def made() -> Blocks:
        return Blocks(rows=m, columns=n, turn=turn.fit(n, inner))

    while n > 128 and vmem(made(), inner, x, w) > budget(on):
        n -= 128
    while m > 16 and vmem(made(), inner, x, w) > budget(on):
        m //= 2
    return made()


def supports(
    on: Chip,
    rows: int,
    groups: int,
    columns: int,
    inner: int,
    x: Any,
    w: Any,
    scaled: bool = False,
    blocks: Blocks | None = None,
    by: By = "row",
) -> str:
    """Why a call can't be made, "" where it can. x: dtype of the rows; w: of the matrices; scaled: with scales."""
    why = mixed(x, w, scaled)
    if why:
        return why
    blocks = blocks or choose(on, rows, groups, columns, inner, x, w, by)
    need = vmem(blocks, inner, x, w)
    if need > budget(on):
        return (
            f"blocks of {blocks.rows} x {blocks.columns} x {inner} take {need} bytes of VMEM, {on.name} has {on.vmem}"
        )
    numbers = 2 * (-(-rows // blocks.rows) + groups) + groups
    scales = 2 * -(-blocks_of(columns) // 8) * 8 * blocks_of(blocks_of(inner)) * 128 if scaled else 0
    if 4 * (numbers + scales) > on.smem // 2:
        return f"{rows} rows of {groups} groups need {numbers + scales} numbers in SMEM, {on.name} has {on.smem} bytes"
    return ""


def cost_estimate(rows: int, groups: int, columns: int, inner: int, x: Any, w: Any) -> pl.CostEstimate:
    """Of a call in which min(rows, groups) groups have rows."""
    a, b = jnp.dtype(x).itemsize, jnp.dtype(w).itemsize
    return pl.CostEstimate(
        flops=2 * rows * columns * inner,
        bytes_accessed=rows * (inner + columns) * a + min(rows, groups) * columns * inner * b,
        transcendentals=0,
    )


def _kernel(group: Any, tile: Any, starts: Any, layer: Any, x: Any, w: Any, *rest: Any, by: By, turn: Turn) -> None:
    """One block of rows against one group's block of columns. The block of the product stays where it is while the
    groups that share its rows come one after the other, and each writes its own rows."""
    *scale, out, total = rest
    i = pl.program_id(1)
    e, few = group[i], math.gcd(out.shape[0], turn.kept)

    def keep(into: Any) -> None:
        def some(k: Any, _: None) -> None:
            here = pl.ds(at(k, few, 0, few), few)
            y = total[here] * scale[0][:, into] if scale and by == "row" else total[here]
            row = tile[i] * out.shape[0] + k * few + jax.lax.broadcasted_iota(jnp.int32, y.shape, 0)
            mine = (row >= starts[e]) & (row < starts[e + 1])
            out[here, into] = jnp.where(mine, y.astype(out.dtype), out[here, into])

        repeat(out.shape[0] // few, some)

    if scale and by == "block":
        accumulate(total, x, w, turn, keep, scale[0], pl.program_id(0) * (out.shape[1] // SIDE))
    else:
        accumulate(total, x, w, turn, keep)


def grouped_matmul(
    rows: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    scale: jax.Array | None = None,
    by: By = "row",
    layer: jax.Array | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Each row by the matrix of its group, summed in float32.

    rows [T, in], bfloat16 or float32, sorted by group; w [E, out, in]; sizes int32[E], which sum to T, any of them 0
    -> [T, out] in the dtype of rows.
    w: of the same dtype, or int8 or float8_e4m3fn with the scale of each row of a matrix, float32[E, 1, out], or of
    each 128 x 128, float32[E, out / 128, in / 128], rounded up; `by` says which.
    layer int32[]: w is [L, E, out, in], scale likewise, and this one of them is read, where it lies.
    interpret: as pallas_call has it. Raises ValueError for what `supports` refuses.
    """
    if layer is None:
        w, scale, layer = w[None], None if scale is None else scale[None], jnp.zeros((), jnp.int32)
    (count, inner), (_, groups, columns, _), on = rows.shape, w.shape, chip()
    blocks = blocks or choose(on, count, groups, columns, inner, rows.dtype, w.dtype, by)
    why = supports(on, count, groups, columns, inner, rows.dtype, w.dtype, scale is not None, blocks)
    if why:
        raise ValueError(f"grouped_matmul: {why}")
    plan, (m, n) = visits(sizes, count, blocks.rows), (blocks.rows, blocks.columns)
    specs, operands = (
        [
            pl.BlockSpec((m, inner), lambda j, i, group, tile, starts, layer: (tile[i], 0)),
            pl.BlockSpec((None, None, n, inner), lambda j, i, group, tile, starts, layer: (layer[0], group[i], j, 0)),
        ],
        [rows, w],
    )
    if scale is not None:
        operands.append(scale)
        specs.append(_scales(scale, by, n))
    return pl.pallas_call(
        partial(_kernel, by=by, turn=blocks.turn),
        out_shape=jax.ShapeDtypeStruct((count, columns), rows.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(-(-columns // n), plan.count),
            in_specs=specs,
            out_specs=pl.BlockSpec((m, n), lambda j, i, group, tile, starts, layer: (tile[i], j)),
            scratch_shapes=[pltpu.VMEM((m, blocks.turn.columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=on.vmem - on.vmem // 16,
        ),
        cost_estimate=cost_estimate(count, groups, columns, inner, rows.dtype, w.dtype),
        interpret=interpret,
        name="grouped_matmul",
    )(plan.group, plan.tile, plan.starts, layer.reshape(1).astype(jnp.int32), *operands)


def _scales(scale: jax.Array, by: By, columns: int) -> pl.BlockSpec:
    """The scales of one group: of a block's rows of the matrix, or of all its blocks, as scalars."""
    if by == "row":
        return pl.BlockSpec(
            (None, None, 1, columns), lambda j, i, group, tile, starts, layer: (layer[0], group[i], 0, j)
        )
    return pl.BlockSpec(
        (None, None, *scale.shape[2:]),
        lambda j, i, group, tile, starts, layer: (layer[0], group[i], 0, 0),
        memory_space=pltpu.SMEM,
    )
