"""What few steps ask, in programs of their own: penalties, bias, vocabulary masks, logprobs, scores of prompts.

A step whose rows want none of these is one program. Where that only finds the likeliest tokens (Plan.greedy), a draw is
among what few steps ask. The others run the same one, which leaves its logits and hidden
states on the device, and then these: so no step pays for what it does not ask, and no bucket is compiled twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from backends.api.limits import Limits
from backends.api.seats import Asks, Scored, tally
from backends.api.step import I32, TOKEN, U32, ScheduleStep
from backends.jax import caches, dealt, params, sampler
from backends.jax.caches import State
from backends.jax.mesh import replicated
from backends.jax.params import DTYPES
from backends.jax.step import Plan, keep
from backends.jax.step import logits as head

Array: TypeAlias = jax.Array
COUNTS = 2048
"""Entries of histories that one call counts."""
BLOCK = 64
"""Positions of prompts whose logits stand side by side."""
FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")


class Wishes(NamedTuple):
    """What the rows want, [R] each, named as in backends.jax.inputs.Batch. counted, masked: whether it has penalties, a
    mask; logprobs: -1 = none."""

    slot: Any
    output: Any
    top_k: Any
    seed_high: Any
    seed_low: Any
    counted: Any
    masked: Any
    logprobs: Any
    temperature: Any
    top_p: Any
    min_p: Any
    repetition: Any
    presence: Any
    frequency: Any


class Scores(NamedTuple):
    """Logprobs of N tokens. own float32[N]; ids int32[N, K], top float32[N, K]: the likeliest, K = max_logprobs."""

    own: Any
    ids: Any
    top: Any


def pack_wishes(step: ScheduleStep, asks: Asks, rows: int, limits: Limits) -> I32:
    """int32[lines, rows]: the fields of Wishes."""
    s, count = step.sampling, len(step.slots)
    out = np.zeros((len(Wishes._fields), rows), np.int32)
    line = dict(zip(Wishes._fields, out, strict=True))
    line["slot"][count:] = limits.slots
    line["logprobs"][count:] = -1
    line["repetition"][count:] = np.float32(1).view(np.int32)
    for name, value in {
        "slot": step.slots,
        "output": step.output,
        "top_k": s.top_k,
        "seed_high": (s.seed >> np.uint64(32)).astype(np.uint32).view(np.int32),
        "seed_low": s.seed.astype(np.uint32).view(np.int32),
        "counted": 0 if asks.counted is None else asks.counted,
        "masked": step.masked,
        "logprobs": s.logprobs,
        **{name: getattr(s, name).view(np.int32) for name in ("temperature", "top_p", "min_p")},
        **dict(zip(FLOATS[3:], np.ascontiguousarray(s.penalty.T).view(np.int32), strict=True)),
    }.items():
        line[name][:count] = value
    return out


def pack_masks(masks: U32 | None, step: ScheduleStep | None, rows: int, limits: Limits) -> U32:
    """uint32[rows, W]: all bits for a row that is not masked."""
    out = np.full((rows, -(-limits.vocab // 32)), 0xFFFFFFFF, np.uint32)
    if masks is not None and step is not None:
        out[np.flatnonzero(step.masked)] = masks[:, 0]
    return out


def pack_bias(step: ScheduleStep | None, limits: Limits) -> I32:
    """int32[1 + max_bias, 3]: how many, then (row, token, bits of the value)."""
    out = np.zeros((1 + limits.max_bias, 3), np.int32)
    if step is not None:
        given = step.sampling.bias
        out[0, 0], out[1 : 1 + len(given), :2] = len(given), given[:, :2]
        out[1 : 1 + len(given), 2] = np.ascontiguousarray(given[:, 2]).view(np.int32)
    return out


def pack_counts(step: ScheduleStep, asks: Asks, limits: Limits) -> list[I32]:
    """What `count` takes in each of its calls, as many as the rows that are seated with penalties need."""
    if asks.counted is None:
        return []
    seated = step.slots[(step.starts >= 0) & asks.counted]
    if not len(seated):
        return []
    entries, out = tally(step), []
    for at in range(0, max(len(entries), 1), COUNTS):
        part = entries[at : at + COUNTS]
        buffer = np.zeros(1 + limits.max_rows + 3 * COUNTS, np.int32)
        if not at:
            buffer[0], buffer[1 : 1 + len(seated)] = len(seated), seated
        rest = buffer[1 + limits.max_rows :].reshape(COUNTS, 3)
        rest[: len(part)], rest[len(part) :, 0] = part, limits.slots + 1
        out.append(buffer)
    return out


def pack_scored(asked: Scored, limits: Limits) -> I32:
    """int32[1 + 2N]: how many, the tokens fed whose logits score, and what is scored."""
    room = _blocks(limits.max_tokens) * BLOCK
    out = np.zeros(1 + 2 * room, np.int32)
    out[0], out[1 : 1 + len(asked.at)], out[1 + room : 1 + room + len(asked.at)] = len(asked.at), asked.at, asked.token
    return out


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def choose(
    limits: Limits,
    state: State,
    counts: Array,
    logits: Array,
    made: Array,
    packed: Array,
    masks: Array,
    bias: Array,
) -> tuple[State, Array, Array, Scores | None]:
    """Choose again for every row of a step whose own choice, made int32[R, 2] of (token, status), does not count. In
    local view.

    logits float32[R, V]: of the rows that are dealt to this device. Returns the state and the counts with the new
    tokens, made, and the tokens' logprobs, all of every row.
    """
    whole, rows = _unpack(packed), made.shape[0]
    w, masks = dealt.mine((whole, masks))
    x = logits
    if limits.max_history:
        x = jax.lax.cond(w.counted.any(), lambda: penalise(logits, counts[w.slot], w), lambda: logits)
    x = jax.lax.cond(bias[0, 0] > 0, lambda: _biased(x, bias, dealt.first(rows)), lambda: x)
    x = jax.lax.cond(w.masked.any(), lambda: jnp.where(allowed(masks, x.shape[1]), x, -jnp.inf), lambda: x)
    own = sampler.pick(jax.lax.optimization_barrier(x), sampler.Wants.of(w, state.length[w.slot]))
    tokens = dealt.join(own, rows)
    if limits.max_history:
        at = jnp.where((whole.counted > 0) & ((whole.output & TOKEN) > 0), whole.slot, limits.slots + 1)
        counts = counts.at[at, tokens].add(2, mode="drop")
    scores = None
    if limits.max_logprobs:
        k = limits.max_logprobs
        found = jax.lax.cond((w.logprobs >= 0).any(), lambda: score(logits, own, k), lambda: _nothing(own.shape[0], k))
        scores = Scores(*(dealt.join(x, rows) for x in found))
    return keep(state, whole, tokens), counts, jnp.stack([tokens, made[:, 1]], 1), scores


def _unpack(packed: Array) -> Wishes:
    lines = dict(zip(Wishes._fields, packed, strict=True))
    for name in ("seed_high", "seed_low"):
        lines[name] = jax.lax.bitcast_convert_type(lines[name], jnp.uint32)
    for name in FLOATS:
        lines[name] = jax.lax.bitcast_convert_type(lines[name], jnp.float32)
    return Wishes(**lines)


def penalise(x: Array, counts: Array, w: Wishes) -> Array:
    """Logits float32[R, V] after the penalties. counts int32[R, V] of each row's slot; a neutral row stays."""
    made = counts >> 1
    repetition = w.repetition[:, None]
    x = jnp.where(counts > 0, jnp.where(x > 0, x / repetition, x * repetition), x)
    return x - w.presence[:, None] * (made > 0) - w.frequency[:, None] * made.astype(jnp.float32)


def _biased(x: Array, bias: Array, first: Any) -> Array:
    """Logits with the first bias[0, 0] entries added. first: number of their first row."""
    row = bias[1:, 0] - first
    here = (jnp.arange(bias.shape[0] - 1) < bias[0, 0]) & (row >= 0)
    row = jnp.where(here, row, x.shape[0])
    return x.at[row, bias[1:, 1]].add(jax.lax.bitcast_convert_type(bias[1:, 2], jnp.float32), mode="drop")


def allowed(masks: Array, vocab: int) -> Array:
    """bool[R, vocab] of packed masks uint32[R, W]."""
    spread = (masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return spread.reshape(masks.shape[0], -1)[:, :vocab] > 0


def score(logits: Array, tokens: Array, alternatives: int) -> Scores:
    """By the log-softmax of raw logits float32[N, V]. Ties among the likeliest go to the lowest id, as top_k does."""
    best = logits.max(-1, keepdims=True)
    whole = best + jnp.log(jnp.exp(logits - best).sum(-1, keepdims=True))
    top, ids = jax.lax.top_k(logits, alternatives)
    own = jnp.take_along_axis(logits, tokens[:, None], 1) - whole
    return Scores(own[:, 0], ids.astype(jnp.int32), top - whole)


def _nothing(count: int, k: int) -> Scores:
    return Scores(jnp.zeros(count), jnp.zeros((count, k), jnp.int32), jnp.zeros((count, k)))


def count(limits: Limits, counts: Array, packed: Array) -> Array:
    """Counts int32[slots+1, V] with some slots emptied and entries (slot, token, value) written; see pack_counts."""
    empty = jnp.zeros((1, counts.shape[1]), jnp.int32)
    clear = lambda i, x: jax.lax.dynamic_update_slice_in_dim(x, empty, packed[1 + i], axis=0)  # noqa: E731
    counts = jax.lax.fori_loop(0, packed[0], clear, counts)
    entries = packed[1 + limits.max_rows :].reshape(COUNTS, 3)
    return counts.at[entries[:, 0], entries[:, 1]].set(entries[:, 2], mode="drop")


def score_prompts(plan: Plan, weights: Any, hidden: Array, packed: Array) -> Scores:
    """Logprobs of prompts' tokens, block by block, so that no more than a block's logits stand in memory.

    hidden [T, hidden]; packed: see pack_scored.
    """
    k, room = plan.limits.max_logprobs, _blocks(len(hidden)) * BLOCK
    at, token = packed[1 : 1 + room], packed[1 + room :]

    def block(i: Array, out: Scores) -> Scores:
        where = jax.lax.dynamic_slice_in_dim(at, i * BLOCK, BLOCK)
        x = jax.lax.optimization_barrier(head(plan, weights, hidden[where]))
        part = score(x, dealt.mine(jax.lax.dynamic_slice_in_dim(token, i * BLOCK, BLOCK)), k)
        whole = (dealt.join(b, BLOCK) for b in part)
        return Scores(
            *(jax.lax.dynamic_update_slice_in_dim(a, b, i * BLOCK, 0) for a, b in zip(out, whole, strict=True))
        )

    return jax.lax.fori_loop(0, (packed[0] + BLOCK - 1) // BLOCK, block, _nothing(room, k))


def lower_choose(plan: Plan, rows: int) -> jax.stages.Lowered:
    """The program that chooses for `rows` rows. State and counts donated."""
    limits, whole = plan.limits, PartitionSpec()
    shape = lambda kind, *size: jax.ShapeDtypeStruct(size, kind, sharding=replicated(plan.mesh))  # noqa: E731

    def run(*given: Any) -> Any:
        return choose(limits, *given)

    local = jax.shard_map(
        run,
        mesh=plan.mesh,
        in_specs=(whole, whole, dealt.ROWS, whole, whole, whole, whole),
        out_specs=whole,
        check_vma=False,
    )
    logits = dealt.room(rows, plan.config.mesh), limits.vocab
    return jax.jit(local, donate_argnums=(0, 1)).lower(
        caches.state_shapes(limits, plan.mesh),
        caches.count_shape(limits, plan.mesh),
        jax.ShapeDtypeStruct(logits, jnp.float32, sharding=NamedSharding(plan.mesh, dealt.ROWS)),
        shape(jnp.int32, rows, 2),
        shape(jnp.int32, len(Wishes._fields), rows),
        shape(jnp.uint32, rows, -(-limits.vocab // 32)),
        shape(jnp.int32, 1 + limits.max_bias, 3),
    )


def lower_count(plan: Plan) -> jax.stages.Lowered:
    """The program ahead of a step that seats rows with penalties. Counts donated."""
    whole = replicated(plan.mesh)
    packed = jax.ShapeDtypeStruct((1 + plan.limits.max_rows + 3 * COUNTS,), jnp.int32, sharding=whole)

    def run(counts: Array, packed: Array) -> Array:
        return count(plan.limits, counts, packed)

    return jax.jit(run, donate_argnums=0, out_shardings=whole).lower(caches.count_shape(plan.limits, plan.mesh), packed)


def lower_score(plan: Plan, tokens: int) -> jax.stages.Lowered:
    """The program behind a step of `tokens` tokens that scores prompts; such a step is padded to the largest bucket
    that there is."""
    whole = PartitionSpec()

    def run(weights: Any, hidden: Array, packed: Array) -> Scores:
        return score_prompts(plan, weights, hidden, packed)

    local = jax.shard_map(
        run,
        mesh=plan.mesh,
        in_specs=(params.map_leaves(lambda leaf: leaf.hold(leaf.spec), plan.leaves), whole, whole),
        out_specs=whole,
        check_vma=False,
    )
    kept, kind = replicated(plan.mesh), DTYPES[plan.config.dtype]
    return jax.jit(local).lower(
        params.shapes(plan.leaves, plan.config, plan.mesh),
        jax.ShapeDtypeStruct((tokens, plan.spec.hidden), kind, sharding=kept),
        jax.ShapeDtypeStruct((1 + 2 * _blocks(tokens) * BLOCK,), jnp.int32, sharding=kept),
    )
