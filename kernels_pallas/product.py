"""What the matrix kernels share: rows times a block of a matrix, plain or quantised, and what blocks take."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from kernels_pallas.chip import Chip

By: TypeAlias = Literal["row", "block"]
"""What has a scale of its own: each row of a matrix, or each SIDE x SIDE of it."""
SIDE = 128
WIDE = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
"""Dtypes of rows."""
NARROW = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))
"""Dtypes of quantised matrices."""
SHARE = 0.75
"""Of VMEM, what the blocks of a kernel may take; the rest is the compiler's, for values in the middle."""


def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [T, in] times w [out, in], widened to x's dtype, summed in float32 -> float32[T, out]."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x, w.astype(x.dtype), (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def multiply_blocks(x: jax.Array, w: jax.Array, scale: Any, first: Any) -> jax.Array:
    """The same, where each SIDE x SIDE of a matrix has a scale of its own.

    w: the rows of the matrix from block `first` on. scale: ref of float32[out / SIDE, in / SIDE] in SMEM, rounded up,
    of the whole matrix. The last columns, and rows that the matrix doesn't have, may fill no block.
    """
    total, rows = jnp.zeros((x.shape[0], w.shape[0]), jnp.float32), -(-w.shape[0] // SIDE)
    last = scale.shape[0] - 1
    for i in range(-(-x.shape[1] // SIDE)):
        part = slice(i * SIDE, min((i + 1) * SIDE, x.shape[1]))
        line = [jnp.full((1, SIDE), scale[jnp.minimum(first + r, last), i]) for r in range(rows)]
        total += multiply(x[:, part], w[:, part]) * jnp.concatenate(line, axis=1)[:, : w.shape[0]]
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
