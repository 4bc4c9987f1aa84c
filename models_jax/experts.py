"""Rows to experts and back, for JAX. models_torch/experts.py has the same names and the same meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from engine.model.spec import Experts
from kernels_pallas.chip import INTERPRETED, chip
from kernels_pallas.grouped_matmul import grouped_matmul, supports
from kernels_pallas.product import By
from models_jax import ops
from models_jax.ops import Array
from models_jax.quantised import Quantised
from models_jax.stacked import Stacked, entry, plain, whole

Matrices: TypeAlias = Array | Stacked | Quantised
"""[E, out, in]: one matrix for each expert."""

LANES = 128
"""Numbers of a TPU's register: rows of a matrix are laid out in so many."""
TILE = 16
"""Rows of one expert that a CPU multiplies at once."""


class Order(NamedTuple):
    """The T * k choices of T tokens, sorted by expert. token int32[T*k]: whose choice a row is; expert int32[T*k];
    back int32[T, k]: the row of each choice; sizes int32[E]: rows of each expert."""

    token: Array
    expert: Array
    back: Array
    sizes: Array


def route(scores: Array, top_k: int, renormalised: bool) -> tuple[Array, Array]:
    """scores [T, E] -> shares [T, k] of the softmax, of the chosen alone where renormalised, and int32[T, k] chosen."""
    high = scores.astype(jnp.float32)
    top, chosen = jax.lax.top_k(high, top_k)
    total = jax.nn.logsumexp(top if renormalised else high, axis=-1, keepdims=True)
    return jnp.exp(top - total).astype(scores.dtype), chosen


def sort(chosen: Array, count: int) -> Order:
    """Sort the choices int32[T, k] of `count` experts."""
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    sizes = jnp.zeros(count, jnp.int32).at[flat].add(1)
    return Order(order // chosen.shape[1], flat[order], back.reshape(chosen.shape), sizes)


def gated(e: Experts, p: Mapping[str, Any], x: Array, order: Order) -> Array:
    """x [T, hidden] -> act(gate(x)) * up(x) of each choice, by the matrices and biases of those names in p:
    [T*k, size]."""
    rows = spread(x, order)
    gate = multiply(rows, p["gate"], p.get("gate_bias"), order)
    up = multiply(rows, p["up"], p.get("up_bias"), order)
    return ops.silu(gate) * up if e.act == "silu" else ops.clamped(gate, up, e.alpha, e.limit)


def spread(x: Array, order: Order) -> Array:
    """x [T, hidden] -> a row for each choice, [T*k, hidden]."""
    return x[order.token]


def multiply(rows: Array, w: Matrices, bias: Array | None, order: Order) -> Array:
    """rows [T*k, in], w [E, out, in] -> [T*k, out]: each row by the matrix of its expert."""
    y = grouped(rows, w, order.sizes)
    if y is None:
        y = jax.lax.platform_dependent(rows, w, order.sizes, cpu=tiled, default=ragged)
    return y if bias is None else y + bias[order.expert]


def grouped(rows: Array, w: Matrices, sizes: Array) -> Array | None:
    """`multiply` by a kernel, where a TPU is compiled for that has one for it."""
    on, scaled = chip(), isinstance(w, Quantised)
    body, layer = whole(w.body if scaled else w)
    if body.shape[-1] % LANES:  # XLA would lay all layers' matrices out anew before the kernel reads them
        return None
    by: By = w.by if isinstance(w, Quantised) else "row"
    if on == INTERPRETED or supports(on, rows.shape[0], *body.shape[-3:], rows.dtype, body.dtype, scaled, by=by):
        return None
    if scaled:
        return grouped_matmul(rows, body, sizes, whole(w.scale)[0], w.by, layer)
    return grouped_matmul(rows, body, sizes, layer=layer)


def ragged(rows: Array, w: Matrices, sizes: Array) -> Array:
    """`multiply` in one operation of XLA's, which on a CPU would multiply every row by every expert."""
    matrices = w.dequantised().astype(rows.dtype) if isinstance(w, Quantised) else plain(w)
    dims = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
    y = jax.lax.ragged_dot_general(
        rows, matrices, sizes, dims, precision=ops.precision(rows.dtype), preferred_element_type=jnp.float32
    )
    return y.astype(rows.dtype)


def tiled(rows: Array, w: Matrices, sizes: Array) -> Array:
    """`multiply` for CPUs: a loop over tiles of at most TILE rows of one expert, as many as there are."""
    count, tile = rows.shape[0], min(TILE, rows.shape[0])
    tiles = (sizes + tile - 1) // tile
    ends, first = jnp.cumsum(tiles), jnp.cumsum(sizes) - sizes
    padded = jnp.pad(rows, ((0, tile), (0, 0)))
    scaled = isinstance(w, Quantised)
    outputs = whole(w.body if scaled else w)[0].shape[-2]

    def one(i: Array, out: Array) -> Array:
        e = jnp.searchsorted(ends, i, side="right")
        at = first[e] + (i - (ends[e] - tiles[e])) * tile
        part = jax.lax.dynamic_slice_in_dim(padded, at, tile)
        # past its expert's rows a tile writes what the next tiles write again, or padding
        return jax.lax.dynamic_update_slice_in_dim(out, ops.contract(part, w.one(e) if scaled else entry(w, e)), at, 0)

    empty = jnp.zeros((count + tile, outputs), rows.dtype)
    return jax.lax.fori_loop(0, ends[-1], one, empty)[:count]


def collect(h: Array, w: Matrices, share: Array, order: Order) -> Array:
    """h [T*k, size], w [E, hidden, size] -> [T, hidden]: the sum of what each token's choices make of h, by their
    shares."""
    return (multiply(h, w, None, order)[order.back] * share[:, :, None]).sum(1)


def mix(bias: Array, share: Array, chosen: Array) -> Array:
    """bias [E, hidden] -> [T, hidden]: the chosen experts' biases, by their shares."""
    return (bias[chosen] * share[:, :, None]).sum(1)
