"""Numbers of a cache of keys and values: as they are, or in 8 bits over a scale for each head's keys and its values."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

Array: TypeAlias = jax.Array
TYPES = {"float32": 4, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}
"""Dtypes of caches, and the bytes of a number."""


def stored(lines: Array, scales: Array, dtype: Any) -> Array:
    """What a cache of a dtype holds of lines [T, kv_heads * 2 * head_dim]: numbers over their scales, to the nearest.

    scales float32[2, kv_heads]: of keys and of values. What is out of range becomes the nearest number that is not.
    """
    heads = lines.astype(jnp.float32).reshape(lines.shape[0], scales.shape[1], 2, -1) / scales.T[:, :, None]
    if jnp.issubdtype(dtype, jnp.integer):
        heads = jnp.round(heads)
    most = jnp.iinfo(dtype) if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype)
    return jnp.clip(heads, float(most.min), float(most.max)).astype(dtype).reshape(lines.shape)


def widen(x: Array) -> Array:
    """Numbers of a cache, each in 32 bits of its own, to be moved about: of 8 bits the bits, whatever they mean."""
    if x.dtype.itemsize == 1:
        return (x if x.dtype == jnp.int8 else pltpu.bitcast(x, jnp.int8)).astype(jnp.int32)
    return x.astype(jnp.float32)


def narrow(x: Array, kind: Any) -> Array:
    """What `widen` took apart."""
    if kind.itemsize == 1:
        x = x.astype(jnp.int8)
        return x if kind == jnp.int8 else pltpu.bitcast(x, kind)
    return x.astype(kind)
