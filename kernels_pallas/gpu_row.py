"""One row times a matrix on a GPU, in Pallas by way of Triton: as fast as the matrix is read.

A matrix product of one row has nothing for tensor cores to do. This has more loads in
flight than XLA's own kernels (docs/decisions/0019).
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

Array: TypeAlias = jax.Array
CHUNK = 2048
"""Entries of a row of the matrix that are read at once."""
ROWS, WARPS = 4, 8
"""Rows of the matrix and warps of a program."""
LEAST = 256
"""Less than this would leave threads without a load of 16 bytes."""


def chunk(inner: int) -> int:
    """The largest power of two that divides `inner`, up to CHUNK."""
    return min(CHUNK, inner & -inner)


def supports(x: Any, w: Any) -> str:
    """Why the kernel is not for x [T, in] times w [out, in]; "" where it is."""
    if x.shape[0] != 1:
        return f"{x.shape[0]} rows, not one"
    if x.dtype != w.dtype or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{x.dtype} times {w.dtype}"
    if chunk(w.shape[1]) < LEAST:
        return f"rows of {w.shape[1]} are not in chunks of {LEAST}"
    if w.shape[0] % ROWS:
        return f"{w.shape[0]} rows are not in groups of {ROWS}"
    return ""


@partial(jax.jit, static_argnames=("dtype", "interpret"))
def row_times(x: Array, w: Array, dtype: Any, *, interpret: bool = False) -> Array:
    """x [1, in] times w [out, in], summed in float32 -> [1, out] in dtype."""
    many, inner = w.shape
    out = pl.pallas_call(
        partial(_body, size=ROWS, step=chunk(inner)),
        out_shape=jax.ShapeDtypeStruct((many,), dtype),
        grid=(many // ROWS,),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="row_times",
    )(x.reshape(-1), w)
    return out.reshape(1, many)


def _body(x: Any, w: Any, out: Any, *, size: int, step: int) -> None:
    """A program: `size` rows of the matrix, all chunks read before the sums are made."""
    first = pl.program_id(0) * size
    row = (first + jnp.arange(size, dtype=jnp.int32))[:, None]
    total = jnp.zeros((size, step), jnp.float32)
    for at in range(0, w.shape[1], step):
        column = (at + jnp.arange(step, dtype=jnp.int32))[None, :]
        part = plt.load(w.at[row, column]).astype(jnp.float32)
        total = total + part * plt.load(x.at[at + jnp.arange(step, dtype=jnp.int32)]).astype(jnp.float32)[None, :]
    plt.store(out.at[first + jnp.arange(size, dtype=jnp.int32)], total.sum(1).astype(out.dtype))
