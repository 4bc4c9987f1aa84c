"""How tokens are chosen on the device, by the rules of backends.api.choice, without a sort of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from backends.api.random import PARITY, ROTATIONS, ROUNDS
from backends.api.step import NONFINITE, OK
from backends.jax.inputs import Batch

Array: TypeAlias = jax.Array
INF = 0x7F800000
"""Bits of float32 infinity: the largest distance there is."""


def sample(logits: Array, batch: Batch, position: Array) -> tuple[Array, Array]:
    """Choose a token for each row. logits float32[R, V]; position int32[R]: of the token made.

    Returns tokens int32[R] and status int32[R]. A batch of greedy rows costs an argmax and the check of the logits.
    """
    # the barriers and the argmax outside of the branch keep XLA's TPU compiler from fusing head, noise and argmax: with
    # a vocabulary of 128k it would take more than a minute
    logits = jax.lax.optimization_barrier(logits)
    finite = count(~jnp.isfinite(logits)) == 0
    return pick(logits, batch, position), jnp.where(finite, OK, NONFINITE).astype(jnp.int32)


def best(logits: Array) -> tuple[Array, Array]:
    """`sample` of greedy rows, with no branch: a GPU's host would wait for the device at each."""
    finite = count(~jnp.isfinite(logits)) == 0
    return jnp.argmax(logits, -1).astype(jnp.int32), jnp.where(finite, OK, NONFINITE).astype(jnp.int32)


def pick(logits: Array, batch: Any, position: Array) -> Array:
    """Tokens int32[R] of logits float32[R, V] that are as the row wants them, but for the temperature. batch: has
    temperature, top_k, top_p, min_p, seed_high and seed_low, one entry a row."""
    drawn = batch.temperature > 0
    scores = jax.lax.cond(
        drawn.any(),
        lambda: jnp.where(drawn[:, None], draw(logits, batch, position), logits),
        lambda: logits,
    )
    return jnp.argmax(scores, -1).astype(jnp.int32)


def draw(logits: Array, batch: Any, position: Array) -> Array:
    """float32[R, V] whose largest is the draw: noise included, -inf for what a filter took out."""
    temperature = jnp.where(batch.temperature > 0, batch.temperature, 1)[:, None]
    distance = (logits.max(-1, keepdims=True) - logits) / temperature
    vocab = logits.shape[1]
    capped = (batch.temperature > 0) & (batch.top_k > 0) & (batch.top_k < vocab)
    nucleus = (batch.temperature > 0) & (batch.top_p < 1)
    edge = jax.lax.cond(
        capped.any(), lambda: top_k(distance, jnp.where(capped, batch.top_k, vocab)), lambda: everything(distance)
    )
    edge = jax.lax.cond(
        nucleus.any(),
        lambda: jnp.where(nucleus, top_p(distance, edge, batch.top_p), edge),
        lambda: edge,
    )
    keep = (bits(distance) <= edge[:, None]) & (jnp.exp(-distance) >= batch.min_p[:, None])
    noise = jax.lax.optimization_barrier(gumbel(batch, position, vocab))
    return jnp.where(keep, noise - distance, -jnp.inf)


def bits(distance: Array) -> Array:
    """uint32 in the order of distances >= 0."""
    return jax.lax.bitcast_convert_type(jnp.abs(distance), jnp.uint32)


def count(which: Array) -> Array:
    """How many are true along the last axis. In float32, whose sums are fast, and exact up to 2^24."""
    return which.astype(jnp.float32).sum(-1)


def everything(distance: Array) -> Array:
    """The edge that keeps every token: uint32[R]."""
    return jnp.full(distance.shape[:1], INF, jnp.uint32)


def top_k(distance: Array, k: Array) -> Array:
    """The edge, as bits, within which k int32[R] tokens and those tied with the k-th stand."""
    order = bits(distance)
    return smallest(distance.shape[0], lambda edge: count(order <= edge[:, None]) >= k)


def top_p(distance: Array, edge: Array, p: Array) -> Array:
    """The edge within which the likeliest tokens reach p float32[R] of the mass inside the edge given."""
    order = bits(distance)
    mass = jnp.where(order <= edge[:, None], jnp.exp(-distance), 0)
    want = p * mass.sum(-1)
    return smallest(distance.shape[0], lambda edge: jnp.where(order <= edge[:, None], mass, 0).sum(-1) >= want)


def smallest(rows: int, enough: Callable[[Array], Array]) -> Array:
    """The smallest edge uint32[rows] at which `enough` holds, by bisection over the bits; INF where it never does."""

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        ok = enough(middle)
        return jnp.where(ok, low, middle + 1), jnp.where(ok, middle, high)

    start = jnp.zeros(rows, jnp.uint32), jnp.full(rows, INF, jnp.uint32)
    return jax.lax.fori_loop(0, 31, halve, start)[1]


def threefry(key: tuple[Array, Array], count: tuple[Array, Array]) -> tuple[Array, Array]:
    """threefry2x32 on uint32 arrays that broadcast; written out, as jax.random depends on jax's configuration."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY))
    x0, x1 = jnp.broadcast_arrays(count[0] + keys[0], count[1] + keys[1])
    for group in range(ROUNDS // 4):
        for turn in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << jnp.uint32(turn)) | (x1 >> jnp.uint32(32 - turn))
            x1 = x1 ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1


def gumbel(batch: Any, position: Array, vocab: int) -> Array:
    """Noise float32[R, vocab] of each row's seed at `position`: backends.api.random.gumbel on the device."""
    zero = jnp.zeros((1, 1), jnp.uint32)
    seed = batch.seed_high[:, None], batch.seed_low[:, None]
    folded = threefry(seed, (zero, position[:, None].astype(jnp.uint32)))
    x0, x1 = threefry(folded, (zero, jnp.arange(vocab, dtype=jnp.uint32)[None]))
    u = (((x0 ^ x1) >> jnp.uint32(9)).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)
    return -jnp.log(-jnp.log(u))
