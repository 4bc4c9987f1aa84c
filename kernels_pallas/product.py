"""What the matrix kernels share: rows times a block of a matrix, plain or quantised, and what blocks take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.chip import Chip

By: TypeAlias = Literal["row", "block"]
"""What has a scale of its own: each row of a matrix, or each SIDE x SIDE of it."""
SIDE = 128
Keep: TypeAlias = Callable[[Any], None]
"""Takes columns of a block, pl.Slice, whose product is ready."""
WIDE = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
"""Dtypes of rows."""
NARROW = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))
"""Dtypes of quantised matrices."""
SHARE = 0.75
"""Of VMEM, what the blocks of a kernel may take; the rest is the compiler's, for values in the middle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a turn of the loop inside of a block multiplies: its columns and how deep it sums, whole SIDEs; and the
    columns and the depth of the parts that it is written out in, as large as registers allow. kept: rows that a group
    keeps of its product at once."""

    columns: int
    depth: int
    across: int
    part: int
    kept: int = 32

    def exact(self) -> Turn:
        """The same for rows of float32, which are multiplied in six passes of bfloat16."""
        return replace(
            self, columns=min(self.columns, 256), depth=min(self.depth, 256), across=SIDE, part=SIDE, kept=32
        )

    def fit(self, columns: int, inner: int) -> Turn:
        """The same for a block of so many columns, whole SIDEs, and the summed dimension: turns that fill them, or
        leave the least over."""
        wide = _divisor(columns, self.columns)
        near = [d for d in range(self.depth, self.depth // 2, -SIDE) if inner % d == 0]
        depth = inner if inner <= self.depth else (near or [self.depth])[0]
        across = _divisor(wide, self.across)
        return replace(self, columns=wide, depth=depth, across=across, part=min(self.part, depth))


def _divisor(size: int, most: int) -> int:
    """The largest number of whole SIDEs, up to `most`, that divides a size of whole SIDEs."""
    return next(n for n in range(min(size, most), 0, -SIDE) if size % n == 0)


def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [T, in] times w [out, in], widened to x's dtype, summed in float32 -> float32[T, out]."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x, w.astype(x.dtype), (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def accumulate(total: Any, x: Any, w: Any, turn: Turn, keep: Keep, scale: Any = None, first: Any = 0) -> None:
    """x [T, in] times w [out, in], turn.columns of the product at a time: refs, whose product is in `total`,
    float32[T, turn.columns], when `keep` is called with where it belongs.

    scale: None, or of each block of the whole matrix, float32[out / SIDE, in / SIDE] in SMEM, rounded up; `first` is
    the block of w's first row. The last columns, and rows that the matrix doesn't have, may fill no block.
    """
    columns, inner = w.shape
    whole = inner // turn.depth

    def one(j: Any, k: Any, depth: int, fresh: bool) -> None:
        for a in range(0, depth, turn.part):
            for b in range(0, turn.columns, turn.across):
                into = pl.ds(at(j, turn.columns, b), turn.across)
                summed = pl.ds(at(k, turn.depth, a), min(turn.part, depth - a))
                if scale is None:
                    y = multiply(x[:, summed], w[into, summed])
                else:
                    y = _scaled(x, w, into, summed, scale, first)
                here = slice(b, b + turn.across)
                total[:, here] = y if fresh and not a else total[:, here] + y

    def across(j: Any, _: None) -> None:
        if whole > 1:
            total[...] = jnp.zeros(total.shape, jnp.float32)
        repeat(whole, lambda k, _: one(j, k, turn.depth, whole == 1))
        if inner % turn.depth:
            one(j, whole, inner % turn.depth, whole == 0)
        keep(pl.ds(at(j, turn.columns, 0), turn.columns))

    repeat(columns // turn.columns, across)


def repeat(turns: int, body: Any) -> None:
    """A loop; none where there is one turn."""
    if turns == 1:
        body(0, None)
    elif turns:
        jax.lax.fori_loop(0, turns, body, None)


def at(i: Any, step: int, offset: int, whole: int = SIDE) -> Any:
    """i * step + offset, which the compiler is told to be so many times a whole number."""
    return i * step + offset if isinstance(i, int) else pl.multiple_of(i * step + offset, whole)


def _scaled(x: Any, w: Any, into: Any, summed: Any, scale: Any, first: Any) -> jax.Array:
    """The product of a part whose SIDE x SIDE have scales of their own."""
    total, last = jnp.zeros((x.shape[0], into.size), jnp.float32), scale.shape[0] - 1
    row, column = into.start // SIDE, summed.start // SIDE
    for i in range(-(-summed.size // SIDE)):
        part = pl.ds(at(summed.start, 1, i * SIDE), min(SIDE, summed.size - i * SIDE))
        line = [
            jnp.full((1, SIDE), scale[jnp.minimum(first + row + r, last), column + i]) for r in range(into.size // SIDE)
        ]
        total += multiply(x[:, part], w[into, part]) * jnp.concatenate(line, axis=1)
    return total


def padded(rows: int, columns: int, dtype: Any) -> int:
    """Bytes of a block in VMEM, where lines are of 128 and stand in groups of 8, 16 or 32."""
    size = jnp.dtype(dtype).itemsize
    group = 8 * max(1, 4 // size)
    return -(-rows // group) * group * -(-columns // 128) * 128 * size


def blocks_of(size: int) -> int:
    """Scales along a dimension."""
    return -(-size // SIDE)


def budget(chip: Chip) -> int:
    """Bytes of VMEM that the blocks of a kernel may take."""
    return int(SHARE * chip.vmem)


def mixed(x: Any, w: Any, scaled: bool) -> str:
    """Why rows of dtype x aren't multiplied with matrices of dtype w, with scales or without; "" where they are."""
    x, w = jnp.dtype(x), jnp.dtype(w)
    if x not in WIDE:
        return f"rows of {x.name}; bfloat16 and float32 are multiplied"
    if w not in NARROW and w != x:
        return f"matrices of {w.name} for rows of {x.name}"
    if scaled != (w in NARROW):
        return f"matrices of {w.name} {'with' if scaled else 'without'} scales"
    return ""
