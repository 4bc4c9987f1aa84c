"""Attention of one tile over one block of keys: products and an online softmax, in bits (powers of two)."""

from __future__ import annotations

from functools import partial
from math import e, log2
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.form import LANES, SUBLANES, Form, Refs

Array: TypeAlias = jax.Array
FAR = -1e30
"""Score of what a query does not see: finite, so that no difference of scores is NaN."""


class Part(NamedTuple):
    """Rows of a tile that are one product: `many` of them, of product j's buffers from row `at` on. They ask `heads`
    key-value heads from `head` on, side by side. j, at, head may be known on the chip alone."""

    j: Any
    at: Any
    many: int
    head: Any
    heads: int

    @property
    def rows(self) -> tuple[Any, Any]:
        return self.j, pl.ds(self.at if isinstance(self.at, int) else pl.multiple_of(self.at, SUBLANES), self.many)


def count(form: Form, size: int) -> int:
    """How many products a tile of `size` queries is."""
    return form.kv_heads if form.unfolds(size) else form.products


def part(form: Form, size: int, n: Any) -> Part:
    """Product n of a tile of `size` queries."""
    many = form.many(size)
    if form.unfolds(size):
        return Part(n // form.fold, n % form.fold * many, many, n, 1)
    return Part(n, 0, many, n * form.fold, form.fold)


def begin(form: Form, r: Refs, i: Array, size: int) -> None:
    """The queries of tile i as matrices, block-diagonal where heads are folded, and nothing seen but sinks."""
    rows, wide, half = form.rows, form.lanes, i % 2
    many = size * rows
    head = jax.lax.broadcasted_iota(jnp.int32, (many, wide), 0) % rows // form.group
    for j in range(form.products):
        x = r.asked[half, :size, j * rows : (j + 1) * rows, :].astype(jnp.float32).reshape(many, wide)
        if form.scaled:
            x *= _wide(_each(form, r, 1, j, size), wide)
        top = _each(form, r, 0, j, size)
        if form.unfolds(size):
            for k, (y, t) in enumerate(zip(_turn(form, x), _turn(form, top), strict=True)):
                p = part(form, size, j * form.fold + k)
                r.query[*p.rows, :wide] = y.astype(r.query.dtype)
                r.top[p.rows] = t
            continue
        blocks = [jnp.where(head == k, x, 0) for k in range(form.fold)] if form.fold > 1 else [x]
        r.query[j, :many, :] = jnp.concatenate(blocks, axis=1).astype(r.query.dtype)
        r.top[j, :many, :] = top
    lane = jax.lax.broadcasted_iota(jnp.int32, (form.products, many, LANES), 2)
    # sums of large tiles are over lanes, at the end
    r.sum[:, :many, :] = jnp.where(lane == 0, 1.0, 0.0) if form.large(size) else jnp.ones(lane.shape, jnp.float32)
    r.acc[:, :many, :] = jnp.zeros((form.products, many, r.acc.shape[2]), jnp.float32)
    if form.large(size):
        shape = form.many(size), LANES
        query = jax.lax.broadcasted_iota(jnp.int32, shape, 0) // (form.group if form.unfolds(size) else rows)
        r.last[: shape[0], :] = query - jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    elif form.tree:
        _nodes(form, r, i, size)


def _nodes(form: Form, r: Refs, i: Array, size: int) -> None:
    """What each query of a small tile sees of its row's tokens, and where it stands, in its rows."""
    tokens = r.stands.shape[0]
    for t in range(size):
        token = jnp.minimum(r.token[i] + t, tokens - 1)  # a tile's spare queries may be past the last
        for n, value in enumerate((r.bits[token], r.bits[tokens + token], r.stands[token])):
            r.node[n, t * form.rows : (t + 1) * form.rows, :] = jnp.full((form.rows, LANES), value, jnp.int32)


def attend(form: Form, r: Refs, i: Array, b: Array, half: Array, size: int) -> None:
    """One block of keys of tile i. In a large tile the scores of a product are made while the one before is weighed."""
    many, cut = count(form, size), partial(part, form, size)
    stage = partial(_stage, form, r, i, b, half)
    if not form.large(size):
        for n in range(many):
            _small(form, r, i, b, half, cut(n))
        return
    stage(cut(0), None, 0)
    alone = 1
    if form.blocks.looped:

        def two(m: Array, _: None) -> None:
            stage(cut(2 * m + 1), cut(2 * m), 1)
            stage(cut(2 * m + 2), cut(2 * m + 1), 0)

        jax.lax.fori_loop(0, (many - 1) // 2, two, None)
        alone = (many - 1) // 2 * 2 + 1
    for n in range(alone, many):
        stage(cut(n), cut(n - 1), n % 2)
    stage(None, cut(many - 1), many % 2)


def _stage(
    form: Form, r: Refs, i: Array, b: Array, half: Array, ask: Part | None, weigh: Part | None, turn: int
) -> None:
    """The scores of one product go to buffer `turn`, those of another are weighed that are in the other buffer."""
    for c in range(0, form.blocks.keys, form.step):
        if ask is not None:
            _score(form, r, i, b, half, ask, turn, c)
        if weigh is not None:
            _weigh(form, r, half, weigh, 1 - turn, c)
    if ask is not None:
        _settle(form, r, ask, turn)


def _small(form: Form, r: Refs, i: Array, b: Array, half: Array, part: Part) -> None:
    """A product whose scores registers hold."""
    keys, shape = form.blocks.keys, (part.many, form.blocks.keys)
    query = r.position[i] + jax.lax.broadcasted_iota(jnp.int32, shape, 0) // form.rows
    key = b * keys + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = key <= query
    if form.tree:
        low, high, query = (_wide(r.node[n, : part.many, :], keys) for n in range(3))
        bit = key - r.root[r.row[i]]
        word = jax.lax.shift_right_logical(jnp.where(bit < 32, low, high), bit & 31)
        seen &= (bit < 0) | (word & 1 != 0)
    if form.window:
        seen &= key > query - form.window
    s = jnp.where(seen, _scores(form, r, half, part, 0, keys), FAR)
    # where a query saw nothing yet, top is FAR and p is 1: the first real score fades that to nothing
    top = r.top[part.rows]
    peak = jnp.maximum(top, jnp.max(s, axis=1, keepdims=True))
    p, fade = jnp.exp2(s - _wide(peak, keys)), jnp.exp2(top - peak)
    r.top[part.rows] = peak
    r.sum[part.rows] = r.sum[part.rows] * fade + jnp.sum(p, axis=1, keepdims=True)
    o = _values(form, r, half, part, p, 0)
    r.acc[*part.rows, : o.shape[1]] = r.acc[*part.rows, : o.shape[1]] * _wide(fade, o.shape[1]) + o


def _score(form: Form, r: Refs, i: Array, b: Array, half: Array, part: Part, turn: int, c: int) -> None:
    """Put aside the scores of a product with the keys of a step from c on."""
    begin = b * form.blocks.keys - r.position[i]
    s = _scores(form, r, half, part, c, form.step)
    last = r.last[: part.many, :]
    for d in range(0, form.step, LANES):
        seen = last >= begin + (c + d)
        if form.window:
            seen &= last < begin + (c + d + form.window)
        r.scores[turn, : part.many, c + d : c + d + LANES] = jnp.where(seen, s[:, d : d + LANES], FAR)


def _settle(form: Form, r: Refs, part: Part, turn: int) -> None:
    """The new peak of a product, and what it makes of what was summed."""
    wide = part.heads * form.lanes
    most = _fold(jnp.maximum, r.scores[turn, : part.many, :])
    top = r.top[part.rows]
    peak = jnp.maximum(top, jnp.max(most, axis=1, keepdims=True))
    fade = jnp.exp2(top - peak)
    r.top[part.rows] = peak
    r.sum[part.rows] = r.sum[part.rows] * fade
    r.acc[*part.rows, :wide] = r.acc[*part.rows, :wide] * _wide(fade, wide)


def _weigh(form: Form, r: Refs, half: Array, part: Part, turn: int, c: int) -> None:
    """Add the values of the keys of a step from c on, by their weights."""
    p = jnp.exp2(r.scores[turn, : part.many, c : c + form.step] - _wide(r.top[part.rows], form.step))
    r.sum[part.rows] += _fold(jnp.add, p)
    o = _values(form, r, half, part, p, c)
    r.acc[*part.rows, : o.shape[1]] += o


def _scores(form: Form, r: Refs, half: Array, part: Part, key: int, keys: int) -> Array:
    """Scores of a product in bits with `keys` keys from `key` on: [rows, keys]."""
    kind, depth = r.query.dtype, part.heads * form.lanes
    k = _heads(form, r, half, part, key, keys, value=False).astype(kind)
    s = jax.lax.dot_general(
        r.query[*part.rows, :depth],
        k,
        (((1,), (1,)), ((), ())),
        precision=_exact(kind),
        preferred_element_type=jnp.float32,
    )
    if form.cap is None:
        return s * (form.scale * log2(e))
    return jnp.tanh(s * (form.scale / form.cap)) * (form.cap * log2(e))


def _values(form: Form, r: Refs, half: Array, part: Part, p: Array, key: int) -> Array:
    """Weights p [rows, keys] times the values of keys from `key` on: [rows, heads * lanes]."""
    kind = r.query.dtype
    v = _heads(form, r, half, part, key, p.shape[1], value=True).astype(kind)
    return jax.lax.dot_general(
        p.astype(kind), v, (((1,), (0,)), ((), ())), precision=_exact(kind), preferred_element_type=jnp.float32
    )


def _exact(kind: Any) -> jax.lax.Precision:
    return jax.lax.Precision.HIGHEST if kind == jnp.float32 else jax.lax.Precision.DEFAULT


def _heads(form: Form, r: Refs, half: Array, part: Part, key: int, keys: int, *, value: bool) -> Array:
    """Keys or values of the heads of a product side by side, [keys, heads * lanes]: slices of whole registers."""
    out = []
    for n in range(part.heads):
        h = part.head + n
        start = (h * 2 + 2) * form.head - form.lanes if value else h * 2 * form.head
        start = start if isinstance(start, int) else pl.multiple_of(start, LANES)
        out.append(r.keys[half, key : key + keys, pl.ds(start, form.lanes)])
    return jnp.concatenate(out, axis=1) if len(out) > 1 else out[0]


def _each(form: Form, r: Refs, what: int, j: int, size: int) -> Array:
    """What r.heads holds of product j, for each of `size` queries: [size * rows, LANES]."""
    return jnp.concatenate([r.heads[what, j * form.rows : (j + 1) * form.rows, :]] * size, axis=0)


def _wide(x: Array, lanes: int) -> Array:
    """x [M, LANES], equal in all lanes, as [M, lanes]."""
    return jnp.concatenate([x] * (lanes // LANES), axis=1)


def _fold(join: Any, x: Array) -> Array:
    """x [M, n * LANES] joined to [M, LANES]."""
    out = x[:, :LANES]
    for at in range(LANES, x.shape[1], LANES):
        out = join(out, x[:, at : at + LANES])
    return out


def _turn(form: Form, x: Array) -> list[Array]:
    """From rows by query, `fold` heads in a register, to registers of one head, `fold` queries in each; or back.

    x [queries * SUBLANES, lanes] -> for each of the heads [queries * group, lanes].
    """
    fold, group = form.fold, form.group
    x = x.reshape(-1, fold * SUBLANES, x.shape[1])
    out = []
    block = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], SUBLANES, x.shape[2]), 1) // group
    for k in range(fold):
        made = None
        for n in range(fold):
            y = x[:, n * SUBLANES : (n + 1) * SUBLANES, :]
            y = pltpu.roll(y, (n - k) * group % SUBLANES, 1) if n != k else y
            made = y if made is None else jnp.where(block == n, y, made)
        out.append(made.reshape(-1, x.shape[2]))
    return out


def finish(form: Form, r: Refs, half: Array, size: int) -> None:
    """Output of a tile: of each row the lanes of its own head, divided by the sum."""
    rows, wide = form.rows, form.lanes
    many = size * rows
    head = jax.lax.broadcasted_iota(jnp.int32, (many, wide), 0) % rows // form.group
    for j in range(form.products):
        total = r.sum[j, :many, :]
        total = jnp.sum(total, axis=1, keepdims=True) if form.large(size) else _wide(total, wide)
        if form.unfolds(size):
            o = (r.acc[j, :many, :wide] / total).reshape(form.fold, size // form.fold, SUBLANES, wide)
            o = jnp.concatenate([o[k] for k in range(form.fold)], axis=1).reshape(many, wide)
            turned = [y.reshape(-1, SUBLANES, wide) for y in _turn(form, o)]
            o = jnp.concatenate(turned, axis=1).reshape(many, wide)
        else:
            acc = r.acc[j, :many, :]
            o = acc[:, :wide]
            for k in range(1, form.fold):
                o = jnp.where(head == k, acc[:, k * wide : (k + 1) * wide], o)
            o = o / total
        if form.scaled:
            o *= _wide(_each(form, r, 2, j, size), wide)
        r.made[half, :size, j * rows : (j + 1) * rows, :] = o.reshape(size, rows, wide).astype(r.made.dtype)
