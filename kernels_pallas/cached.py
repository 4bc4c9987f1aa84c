"""Numbers of a cache of keys and values: as they are, or in 8 bits over a scale for each head's keys and its values."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

Array: TypeAlias = jax.Array
TYPES = {"float32": 4, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}
"""Dtypes of caches, and the bytes of a number."""


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
