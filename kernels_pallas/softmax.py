"""Attention of one tile over one block of keys: products and an online softmax, in bits (powers of two)."""

from __future__ import annotations

from math import e, log2
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.form import LANES, Form, Refs

Array: TypeAlias = jax.Array
FAR = -1e30
"""Score of what a query does not see: finite, so that no difference of scores is NaN."""


class Part(NamedTuple):
    """Rows of a tile that are one product: the first `many` of product j. They ask `heads` key-value heads from `head`
    on, side by side."""

    j: int
    many: int
    head: int
    heads: int

    @property
    def rows(self) -> tuple[Any, Any]:
        return self.j, pl.ds(0, self.many)


def begin(form: Form, r: Refs, i: Array, size: int) -> None:
    """The queries of tile i as matrices, block-diagonal where heads are folded, and nothing seen but sinks."""
    rows, many = form.rows, size * form.rows
    for j in range(form.products):
        x = r.asked[i % 2, :size, j * rows : (j + 1) * rows, :].astype(jnp.float32)
        if form.scaled:
            x *= _wide(_each(form, r, 1, j), form.lanes)
        r.query[j, :many, :] = _diagonal(form, x).astype(r.query.dtype)
        r.top[j, :many, :] = jnp.concatenate([_each(form, r, 0, j)] * size, axis=0)
    r.sum[:, :many, :] = jnp.full((form.products, many, LANES), 1 / LANES, jnp.float32)
    r.acc[:, :many, :] = jnp.zeros((form.products, many, r.acc.shape[2]), jnp.float32)
    if form.tree:
        _nodes(form, r, i, size)


def _nodes(form: Form, r: Refs, i: Array, size: int) -> None:
    """What each query of a small tile sees of its row's tokens, and where it stands, in its rows."""
    tokens = r.stands.shape[0]

    def node(t: Array, _: None) -> None:
        token = jnp.minimum(r.token[i] + t, tokens - 1)  # a tile's spare queries may be past the last
        into = pl.ds(pl.multiple_of(t * form.rows, form.rows), form.rows)
        for n, value in enumerate((r.bits[token], r.bits[tokens + token], r.stands[token])):
            r.node[n, into, :] = jnp.full((form.rows, LANES), value, jnp.int32)

    jax.lax.fori_loop(0, size, node, None)


def attend(form: Form, r: Refs, i: Array, b: Array, half: Array, size: int) -> None:
    """One block of keys of tile i. What a product asked is weighed before the next one asks: few registers are live."""
    parts = [Part(j, size * form.rows, j * form.fold, form.fold) for j in range(form.products)]
    _see(form, r, i, b, size * form.rows)
    for part in parts:
        if part.j:
            _give(form, r, half, parts[part.j - 1])
        _ask(form, r, half, part)
    _give(form, r, half, parts[-1])


def _see(form: Form, r: Refs, i: Array, b: Array, many: int) -> None:
    """Put aside what to add to scores: FAR where a query does not see a key."""
    keys, shape = form.blocks.keys, (many, form.blocks.keys)
    # a query is a dimension: it needs no registers
    rows = jax.lax.broadcasted_iota(jnp.int32, (many // form.rows, form.rows, keys), 0)
    query = r.position[i] + rows.reshape(shape)
    key = b * keys + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = key <= query
    if form.tree:
        low, high, query = (_wide(r.node[n, :many, :], keys) for n in range(3))
        bit = key - r.root[r.row[i]]
        word = jax.lax.shift_right_logical(jnp.where(bit < 32, low, high), bit & 31)
        seen &= (bit < 0) | (word & 1 != 0)
    if form.window:
        seen &= key > query - form.window
    r.seen[:many, :] = jnp.where(seen, 0.0, FAR)


def _ask(form: Form, r: Refs, half: Array, part: Part) -> None:
    """Put aside the scores of a product, and what their peak makes of sums and outputs."""
    s = _scores(form, r, half, part, 0, form.blocks.keys) + r.seen[: part.many, :]
    top = r.top[part.rows]
    r.score[: part.many, :] = s
    r.top[part.rows] = peak = jnp.maximum(top, jnp.max(s, axis=1, keepdims=True))
    r.fade[part.rows] = jnp.exp2(top - peak)


def _give(form: Form, r: Refs, half: Array, part: Part) -> None:
    """Weigh what a product asked, and add its values."""
    keys, fade = form.blocks.keys, r.fade[part.rows]
    # where a query saw nothing yet, the peak is FAR and p is 1: the first real score fades that to nothing
    p = jnp.exp2(r.score[: part.many, :] - _wide(r.top[part.rows], keys))
    r.sum[part.rows] = r.sum[part.rows] * fade + sum(p[:, n : n + LANES] for n in range(0, keys, LANES))
    o = _values(form, r, half, part, p, 0)
    r.acc[*part.rows, : o.shape[1]] = r.acc[*part.rows, : o.shape[1]] * _wide(fade, o.shape[1]) + o


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


def _heads(form: Form, r: Refs, half: Array, part: Part, key: Any, keys: int, *, value: bool) -> Array:
    """Keys or values of the heads of a product side by side, [keys, heads * lanes]: slices of whole registers."""
    out = []
    for n in range(part.heads):
        h = part.head + n
        start = (h * 2 + 2) * form.head - form.lanes if value else h * 2 * form.head
        start = start if isinstance(start, int) else pl.multiple_of(start, LANES)
        out.append(r.keys[half, pl.ds(key, keys), pl.ds(start, form.lanes)])
    return jnp.concatenate(out, axis=1) if len(out) > 1 else out[0]


def _each(form: Form, r: Refs, what: int, j: int) -> Array:
    """What r.heads holds of product j: [rows, LANES]."""
    return r.heads[what, j * form.rows : (j + 1) * form.rows, :]


def _wide(x: Array, lanes: int) -> Array:
    """x [M, LANES], equal in all lanes, as [M, lanes]."""
    return jnp.concatenate([x] * (lanes // LANES), axis=1)


def _diagonal(form: Form, x: Array) -> Array:
    """Queries x [queries, rows, lanes] as [queries * rows, fold * lanes], 0 but in the lanes of a row's head."""
    # a query is a dimension: rows of all queries share what says whose they are
    head = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) // form.group
    blocks = [jnp.where(head == k, x, 0) for k in range(form.fold)] if form.fold > 1 else [x]
    return jnp.concatenate(blocks, axis=2).reshape(-1, form.fold * form.lanes)


def _own(form: Form, x: Array) -> Array:
    """Of outputs x [queries * rows, fold * lanes] the lanes of each row's head: [queries, rows, lanes]."""
    x, wide = x.reshape(-1, form.rows, x.shape[1]), form.lanes
    out = x[:, :, :wide]
    head = jax.lax.broadcasted_iota(jnp.int32, out.shape, 1) // form.group
    for k in range(1, form.fold):
        out = jnp.where(head == k, x[:, :, k * wide : (k + 1) * wide], out)
    return out


def finish(form: Form, r: Refs, half: Array, size: int) -> None:
    """Output of a tile: of each row the lanes of its own head, divided by the sum."""
    rows, many = form.rows, size * form.rows
    for j in range(form.products):
        total = jnp.sum(r.sum[j, :many, :].reshape(size, rows, LANES), axis=2, keepdims=True)
        o = _own(form, r.acc[j, :many, :]) / total
        if form.scaled:
            o *= _wide(_each(form, r, 2, j), form.lanes)
        r.made[half, :size, j * rows : (j + 1) * rows, :] = o.astype(r.made.dtype)
