"""Attention of a tile of a prompt: more scores than registers hold, so its work goes through buffers, in three stages.

Work is cut into products of `step` keys (a cut) and the rows of one product. Of a block, cuts that no query sees are
left out, and where blocks say so a cut that all queries see has turns without a mask. A stage of the pipeline asks
(scores of a product and their peak; its values are turned), weighs (scores become weights) or gives (weights times
values). A turn asks `ahead` products, weighs those that the turn before asked and gives those that it weighed, so that
in a turn nothing waits for another stage. Cuts follow each other without a gap; a tile's last two turns are done when
it ends.

Scores stand with keys down and rows of queries across: what a row needs (peak, sum, mask) is a few registers for all of
its keys, and no register is reduced across its lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import e, gcd, log2
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.form import LANES, SUBLANES, Form, Refs
from kernels_pallas.softmax import FAR, Part, _diagonal, _each, _exact, _heads, _own, _wide

Array: TypeAlias = jax.Array
PEAK, FADE, FADED = range(3)
"""In r.stats: of what was asked its peak, and what it makes of sums and, a turn later, of outputs."""


def reset(form: Form, r: Refs, u: Any) -> None:
    """Place u of the pipeline as before a tile's first product: what is weighed and given then adds nothing."""
    r.scores[u] = jnp.full(r.scores.shape[1:], FAR, jnp.float32)
    r.weights[u] = jnp.zeros(r.weights.shape[1:], r.weights.dtype)
    for age in range(2):
        r.values[age, u] = jnp.zeros(r.values.shape[2:], r.values.dtype)
    shape = r.stats.shape[2:]
    r.stats[u, PEAK] = jnp.zeros(shape, jnp.float32)
    r.stats[u, FADE] = r.stats[u, FADED] = jnp.ones(shape, jnp.float32)


def begin_large(form: Form, r: Refs, half: Array) -> None:
    """The queries of a tile as matrices, block-diagonal where heads are folded, and nothing seen but sinks."""
    shape, own = (SUBLANES, form.many), form.many // form.most
    row, down = jax.lax.broadcasted_iota(jnp.int32, shape, 1), jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    r.last[...] = row // own - down

    _in_parts(form, partial(_put, form, r, half))

    def sums(n: Array, _: None) -> None:
        top = jnp.full(shape, FAR, jnp.float32)
        for g in range(own):
            top = jnp.where(row % own == g, r.heads[0, n * own + g, 0], top)
        r.tops[n] = top
        r.sums[n] = jnp.where(down == 0, 1.0, 0.0)
        r.outs[n] = jnp.zeros(r.outs.shape[1:], jnp.float32)

    jax.lax.fori_loop(0, form.pieces, sums, None)


def _in_parts(form: Form, one: Callable[[int, Array, int], None]) -> None:
    """Do what begins or ends a product for some queries of a tile at once, from the first of them on: for so few that
    no register is spilled, for so many that their rows fill registers, and for two products, as one waits."""
    own = form.many // form.most
    few = min(LANES // gcd(LANES, own), form.most)
    for first in range(0, form.products, 2):

        def part(t: Array, _: None, first: int = first) -> None:
            for j in range(first, min(first + 2, form.products)):
                one(j, t * few, few)

        jax.lax.fori_loop(0, form.most // few, part, None)


def _put(form: Form, r: Refs, half: Array, j: int, query: Array, few: int) -> None:
    """Product j of `few` queries from `query` on."""
    rows, lanes, own = form.rows, form.lanes, form.many // form.most
    into = pl.ds(pl.multiple_of(query * own, few * own), few * own)
    x = r.asked[half, pl.ds(query, few), j * rows : (j + 1) * rows, :].astype(jnp.float32)
    if form.scaled:
        x *= _wide(_each(form, r, 1, j), lanes)
    if form.unfolds:
        for k, y in enumerate(_turn(form, x.reshape(few * rows, lanes))):
            r.asks[j * form.fold + k, into, :] = y.astype(r.asks.dtype)
    else:
        r.asks[j, into, :] = _diagonal(form, x).astype(r.asks.dtype)


def attend_large(form: Form, r: Refs, i: Array, b: Array, reach: tuple[Array, Array], half: Array) -> None:
    """One block of keys of tile i, `step` of them at once. reach: the first and last key that some query may see."""
    cuts = form.blocks.keys // form.step
    first, last = (jax.lax.div(key, form.step) for key in reach)

    def cut(c: Array, _: None) -> None:
        if not form.plain:
            _turns(form, r, i, c, first, half, True)
            return
        whole = _whole(form, r, i, c)
        pl.when(whole)(lambda: _turns(form, r, i, c, first, half, False))
        pl.when(~whole)(lambda: _turns(form, r, i, c, first, half, True))

    jax.lax.fori_loop(jnp.maximum(first, b * cuts), jnp.minimum(last + 1, b * cuts + cuts), cut, None)


def _whole(form: Form, r: Refs, i: Array, c: Array) -> Array:
    """Whether all queries of tile i see all keys of cut c."""
    position, begin = r.position[i], c * form.step
    whole = begin + form.step <= position + 1
    return whole & (begin > position + form.most - 1 - form.window) if form.window else whole


def _turns(form: Form, r: Refs, i: Array, c: Array, first: Array, half: Array, masked: bool) -> None:
    """The turns of the pipeline that the products of cut c take. first: of the tile's cuts. Values that one turn lays
    aside are given two turns later, so they have two ages."""
    turns, places = form.pieces // form.ahead, range(form.ahead)

    def one(m: Array, _: None) -> None:
        gives, weighs = (jax.lax.rem(m + 2 * turns - back, turns) for back in (2, 1))  # of the cut before, too
        before = (c - first) * turns + m
        age = jax.lax.rem(before, 2)

        def give(u: int) -> None:
            _give(form, r, gives * form.ahead + u, u, age)

        if form.blocks.apart:

            @pl.when(before >= 2)
            def _() -> None:
                for u in places:
                    give(u)

        for u in places:
            if not form.blocks.apart:
                give(u)
            _weigh(form, r, weighs * form.ahead + u, u)
        for u in places:
            _ask(form, r, i, c, half, m * form.ahead + u, u, age, masked)

    jax.lax.fori_loop(0, turns, one, None)


def _ask(form: Form, r: Refs, i: Array, c: Array, half: Array, n: Array, u: int, age: Array, masked: bool) -> None:
    """Put aside the scores of a product, and its values turned."""
    kind, key = r.asks.dtype, pl.multiple_of(jax.lax.rem(c * form.step, form.blocks.keys), form.step)
    part = Part(n, form.many, n, 1) if form.unfolds else Part(n, form.many, n * form.fold, form.fold)
    r.values[age, u] = _heads(form, r, half, part, key, form.step, value=True).astype(kind).T
    s = jax.lax.dot_general(
        _heads(form, r, half, part, key, form.step, value=False).astype(kind),
        r.asks[n],
        (((1,), (1,)), ((), ())),
        precision=_exact(kind),
        preferred_element_type=jnp.float32,
    )
    if form.cap is None:
        s *= form.scale * log2(e)
    else:
        s = jnp.tanh(s * (form.scale / form.cap)) * (form.cap * log2(e))
    s = s.reshape(-1, SUBLANES, form.many)
    if masked:
        s = jnp.where(_seen(form, r, r.position[i] - c * form.step, s.shape), s, FAR)
    r.scores[u] = s
    top = r.tops[n]
    peak = jnp.maximum(top, jnp.max(jnp.max(s, axis=0), axis=0, keepdims=True))
    r.tops[n] = r.stats[u, PEAK] = peak
    r.stats[u, FADE] = jnp.exp2(top - peak)


def _seen(form: Form, r: Refs, ahead: Array, shape: tuple[int, ...]) -> Array:
    """Which rows see which keys. ahead: how far the tile's first query stands past the first of these."""
    key, last = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * SUBLANES, r.last[...] + ahead
    seen = last >= key
    return seen & (last < key + form.window) if form.window else seen


def _weigh(form: Form, r: Refs, n: Array, u: Any) -> None:
    """The weights of what the turn before asked."""
    # where a query saw nothing yet, the peak is FAR and a weight is 1: the first real score fades that to nothing
    p = jnp.exp2(r.scores[u] - r.stats[u, PEAK])
    r.sums[n] = r.sums[n] * r.stats[u, FADE] + jnp.sum(p, axis=0)
    r.weights[u] = p.reshape(form.step, form.many).astype(r.weights.dtype)
    r.stats[u, FADED] = r.stats[u, FADE]


def _give(form: Form, r: Refs, n: Array, u: Any, age: Array) -> None:
    """Add the values of what the turn before weighed."""
    o = jax.lax.dot_general(
        r.values[age, u],
        r.weights[u],
        (((1,), (0,)), ((), ())),
        precision=_exact(r.weights.dtype),
        preferred_element_type=jnp.float32,
    )
    held = r.outs[n].reshape(-1, SUBLANES, form.many) * r.stats[u, FADED]
    r.outs[n] = held.reshape(o.shape) + o


def finish_large(form: Form, r: Refs, half: Array, cuts: Array) -> None:
    """What is left in the pipeline, then a tile's output: of each row the lanes of its own head, divided by the sum.

    cuts: how many the tile had.
    """
    turns = form.pieces // form.ahead
    age = jax.lax.rem(cuts * turns, 2)

    def before(u: Array, _: None) -> None:
        _give(form, r, (turns - 2) % turns * form.ahead + u, u, age)

    def weigh(u: Array, _: None) -> None:
        n = (turns - 1) * form.ahead + u

        def some(k: Array, total: Array) -> Array:
            rows = pl.ds(k * (LANES // SUBLANES), LANES // SUBLANES)
            p = jnp.exp2(r.scores[u, rows] - r.stats[u, PEAK])
            into = pl.ds(pl.multiple_of(k * LANES, LANES), LANES)
            r.weights[u, into, :] = p.reshape(LANES, form.many).astype(r.weights.dtype)
            return total + jnp.sum(p, axis=0)

        r.sums[n] = jax.lax.fori_loop(0, form.step // LANES, some, r.sums[n] * r.stats[u, FADE])
        r.stats[u, FADED] = r.stats[u, FADE]

    def give(u: Array, _: None) -> None:
        _give(form, r, (turns - 1) * form.ahead + u, u, 1 - age)
        reset(form, r, u)

    for stage in (before, weigh, give):
        jax.lax.fori_loop(0, form.ahead, stage, None)
    _in_parts(form, partial(_output, form, r, half))


def _output(form: Form, r: Refs, half: Array, j: int, query: Array, few: int) -> None:
    """What product j makes of `few` queries from `query` on."""
    rows, lanes, own = form.rows, form.lanes, form.many // form.most
    across = pl.ds(pl.multiple_of(query * own, few * own), few * own)

    def heads(n: int) -> Array:
        return (r.outs[n, :, across] / jnp.sum(r.sums[n, :, across], axis=0, keepdims=True)).T

    if form.unfolds:
        o = [heads(j * form.fold + k).reshape(-1, SUBLANES, lanes) for k in range(form.fold)]
        mixed = jnp.concatenate(o, axis=1).reshape(-1, lanes)
        turned = [y.reshape(-1, SUBLANES, lanes) for y in _turn(form, mixed)]
        out = jnp.concatenate(turned, axis=1).reshape(few, rows, lanes)
    else:
        out = _own(form, heads(j))
    if form.scaled:
        out *= _wide(_each(form, r, 2, j), lanes)
    r.made[half, pl.ds(query, few), j * rows : (j + 1) * rows, :] = out.astype(r.made.dtype)


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
