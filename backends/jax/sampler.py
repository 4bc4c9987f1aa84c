"""How tokens are chosen on the device, by the rules of backends.api.choice, without a sort of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from backends.api.random import PARITY, ROTATIONS, ROUNDS
from backends.api.step import NONFINITE, OK

Array: TypeAlias = jax.Array
INF = 0x7F800000
"""Bits of float32 infinity: the largest distance there is."""
ROWS = 16
"""Rows that are looked through at once: two registers' worth of a TPU's lines."""
BLOCK = 8192
"""Tokens of the vocabulary whose noise is made at once."""


class Wants(NamedTuple):
    """What each row is chosen by, [R]: as in backends.jax.inputs.Batch, and the position of the token made."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    seed_high: Any
    seed_low: Any
    position: Any

    @classmethod
    def of(cls, rows: Any, position: Array) -> Wants:
        """Of what has the fields. position int32[R]."""
        return cls(*(getattr(rows, name) for name in cls._fields[:-1]), position)


def sample(logits: Array, rows: Wants) -> tuple[Array, Array]:
    """Choose a token for each row of logits float32[R, V].

    Returns tokens int32[R] and status int32[R]. Rows are looked through some at a time, so that no more than theirs
    stand in memory again; those that are all greedy cost an argmax and the check of the logits.
    """
    total = logits.shape[0]
    turns = -(-total // ROWS)
    if turns == 1:
        return _some((logits, rows))
    each = -(-total // turns)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, turns * each - total), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(turns, each, *x.shape[1:])

    tokens, status = jax.lax.map(_some, jax.tree.map(cut, (logits, rows)))
    return tokens.reshape(-1)[:total], status.reshape(-1)[:total]


def _some(given: tuple[Array, Wants]) -> tuple[Array, Array]:
    logits, rows = given
    # the barriers and the argmax outside of the branch keep XLA's TPU compiler from fusing head, noise and argmax: with
    # a vocabulary of 128k it would take more than a minute
    logits = jax.lax.optimization_barrier(logits)
    finite = count(~jnp.isfinite(logits)) == 0
    return pick(logits, rows), jnp.where(finite, OK, NONFINITE).astype(jnp.int32)


def best(logits: Array) -> tuple[Array, Array]:
    """`sample` of greedy rows, with no branch: a GPU's host would wait for the device at each."""
    finite = count(~jnp.isfinite(logits)) == 0
    return jnp.argmax(logits, -1).astype(jnp.int32), jnp.where(finite, OK, NONFINITE).astype(jnp.int32)


def pick(logits: Array, rows: Wants) -> Array:
    """Tokens int32[R] of logits float32[R, V] that are as the row wants them, but for the temperature."""
    drawn = rows.temperature > 0
    scores = jax.lax.cond(
        drawn.any(),
        lambda: jnp.where(drawn[:, None], draw(logits, rows), logits),
        lambda: logits,
    )
    return jnp.argmax(scores, -1).astype(jnp.int32)


def draw(logits: Array, rows: Wants) -> Array:
    """float32[R, V] whose largest is the draw: noise included, -inf for what a filter took out."""
    temperature = jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
    distance = (logits.max(-1, keepdims=True) - logits) / temperature
    vocab = logits.shape[1]
    capped = (rows.temperature > 0) & (rows.top_k > 0) & (rows.top_k < vocab)
    nucleus = (rows.temperature > 0) & (rows.top_p < 1)
    edge = jax.lax.cond(
        capped.any(), lambda: top_k(distance, jnp.where(capped, rows.top_k, vocab)), lambda: everything(distance)
    )
    edge = jax.lax.cond(
        nucleus.any(),
        lambda: jnp.where(nucleus, top_p(distance, edge, rows.top_p), edge),
        lambda: edge,
    )
    keep = (bits(distance) <= edge[:, None]) & (jnp.exp(-distance) >= rows.min_p[:, None])
    noise = jax.lax.optimization_barrier(gumbel(rows, vocab))
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


def gumbel(rows: Wants, vocab: int) -> Array:
    """Noise float32[R, vocab] of each row's seed and position: backends.api.random.gumbel on the device. It is made a
    block of tokens at a time: of a whole vocabulary a TPU's compiler makes code without a loop, for half a minute."""
    zero = jnp.zeros((1, 1), jnp.uint32)
    seed = rows.seed_high[:, None], rows.seed_low[:, None]
    folded = threefry(seed, (zero, rows.position[:, None].astype(jnp.uint32)))

    def block(first: Any, size: int) -> Array:
        tokens = jnp.uint32(first) + jnp.arange(size, dtype=jnp.uint32)
        x0, x1 = threefry(folded, (zero, tokens[None]))
        u = (((x0 ^ x1) >> jnp.uint32(9)).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)
        return -jnp.log(-jnp.log(u))

    if vocab <= BLOCK:
        return block(0, vocab)
    turns = -(-vocab // BLOCK)
    made = jnp.zeros((rows.position.shape[0], turns * BLOCK), jnp.float32)

    def put(i: Any, out: Array) -> Array:
        return jax.lax.dynamic_update_slice(out, block(i * BLOCK, BLOCK), (0, i * BLOCK))

    return jax.lax.fori_loop(0, turns, put, made)[:, :vocab]
