"""Rows of logits dealt out over the devices of a mesh, in local view.

Each device makes the logits of its part of the vocabulary for all rows. To choose, it takes the whole vocabulary of its
share of the rows: a mesh of n moves, holds and looks through an n-th of what it would if every device had all logits.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from engine.mesh import RULES, MeshSpec, parts
from models_jax import ops

Array: TypeAlias = jax.Array
ROWS = PartitionSpec(RULES["vocab"])
"""Of an array whose rows are dealt out."""


def room(rows: int, mesh: MeshSpec) -> int:
    """Rows of all devices together: as many for each, the last padded."""
    count = parts("vocab", mesh)
    return -(-rows // count) * count


def deal(logits: Array, vocab: int) -> Array:
    """Logits float32[R, V of this device] -> float32[R of this device, vocab]."""
    count = ops.parts("vocab")
    if count > 1:
        axis = RULES["vocab"]
        logits = jax.lax.all_to_all(_padded(logits, "constant"), axis, split_axis=0, concat_axis=1, tiled=True)
    return logits[:, :vocab]


def mine(tree: Any) -> Any:
    """This device's rows of arrays [R, ...] that every device has; the last row again where there are no more."""
    count = ops.parts("vocab")
    if count == 1:
        return tree

    def cut(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(_padded(x, "edge"), first(x.shape[0]), -(-x.shape[0] // count))

    return jax.tree.map(cut, tree)


def first(rows: int) -> Any:
    """Number of this device's first row of `rows`."""
    count = ops.parts("vocab")
    return jax.lax.axis_index(RULES["vocab"]) * -(-rows // count) if count > 1 else 0


def join(x: Array, rows: int) -> Array:
    """All rows [R, ...] on every device, of those that each has. A sum, each device putting zeros for what the others
    have: a gather of so little XLA makes to a sum on some topologies (v5p:4x4x4) and not on others."""
    count = ops.parts("vocab")
    if count == 1:
        return x
    whole = jnp.zeros((count * x.shape[0], *x.shape[1:]), x.dtype)
    return ops.psum(jax.lax.dynamic_update_slice_in_dim(whole, x, first(rows), 0), "vocab")[:rows]


def _padded(x: Array, how: str) -> Array:
    rest = -x.shape[0] % ops.parts("vocab")
    return jnp.pad(x, ((0, rest), *((0, 0),) * (x.ndim - 1)), how) if rest else x
