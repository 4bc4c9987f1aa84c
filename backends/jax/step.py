"""The one compiled program of a step: page-table edits, forward, sampling and the slots' new state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from backends.api.limits import Limits
from backends.api.step import TOKEN
from backends.jax import caches, dealt, params
from backends.jax.attend import Attend, locate, look
from backends.jax.buckets import Shape, make_shape
from backends.jax.caches import State
from backends.jax.inputs import EDITS, Batch, unpack
from backends.jax.mesh import replicated
from backends.jax.sampler import Wants, best, sample
from engine.config import Resolved
from engine.model.spec import ModelSpec
from models_jax import decoder, ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that the programs of one engine are made from: no weights, and the mesh may be of a TPU only described."""

    spec: ModelSpec
    config: Resolved
    limits: Limits
    mesh: Mesh

    @property
    def leaves(self) -> params.Tree:
        """The parameter tree."""
        return params.tree(self.spec, self.config.stack, self.config.platform, self.config.quantise)

    @property
    def soon(self) -> bool:
        """Whether to be ready soon counts for more than the steps: a small model on a CPU."""
        return self.config.platform == "cpu" and self.config.stack == "scan"

    @property
    def greedy(self) -> bool:
        """Whether steps only find their best tokens, and rows that draw go through another program: a GPU's host waits
        for the device at every branch, and a CPU compiles the draw into every step."""
        return self.config.platform == "gpu" or self.soon


class Kept(NamedTuple):
    """What a step leaves on the device for the programs after it (backends.jax.choosing): logits float32[R, V] that the
    rows choose from, dealt out over the devices, and normed hidden states [T, hidden]."""

    logits: Any
    hidden: Any


def edit(state: State, edits: jax.Array) -> State:
    """Write entries int32[E, 3], (slot, column, page), to the page tables."""
    return state._replace(tables=state.tables.at[edits[:, 0], edits[:, 1]].set(edits[:, 2]))


def run(
    plan: Plan, shape: Shape, taps: Sequence[str], weights: Any, cache: Any, state: State, packed: jax.Array
) -> tuple[Any, State, jax.Array, Kept, dict[str, jax.Array]]:
    """One step in local view. Returns the caches, the state, int32[R, 2] of (token, status), what is kept for the
    programs after it, and the taps, float32."""
    batch = unpack(packed, shape)
    state = edit(state, batch.edits)
    before = jnp.where(batch.start >= 0, batch.start, state.length[batch.slot])
    position = before[batch.row] + jnp.arange(shape.tokens) - batch.first[batch.row]
    tokens = jnp.where(batch.tokens >= 0, batch.tokens, state.last[batch.slot[batch.row]])
    groups = locate(batch, state, position, plan.limits)
    view = look(batch, before, position, groups, shape, plan.config)

    attend = Attend(plan.config, view)
    hidden, cache, found = decoder.forward(plan.spec, weights, tokens, view.position, attend, cache, taps)
    ends = jnp.maximum(batch.first + batch.length - 1, 0)
    if "logits" in taps:
        whole = ops.gather(decoder.logits(plan.spec, weights, hidden), "vocab", 1)
        found["logits"] = whole[:, : plan.spec.vocab]
        scores = dealt.mine(found["logits"][ends])
    else:
        scores = logits(plan, weights, hidden[ends])
    after = before + batch.length
    rows = dealt.mine(Wants.of(batch, after))
    made = dealt.join(jnp.stack(best(scores) if plan.greedy else sample(scores, rows), 1), shape.rows)
    state = _advance(state, batch, after, made[:, 0])
    inner = {k: v.astype(jnp.float32) for k, v in found.items()}
    return cache, state, made, Kept(scores, hidden), inner


def logits(plan: Plan, weights: Any, x: jax.Array) -> jax.Array:
    """Normed hidden states [R, hidden] -> float32[R, V], of the rows that are dealt to this device."""
    return dealt.deal(decoder.logits(plan.spec, weights, x), plan.spec.vocab)


def _advance(state: State, batch: Batch, after: jax.Array, made: jax.Array) -> State:
    """The slots after the step: their lengths, and the last token of rows that return one."""
    return keep(state._replace(length=state.length.at[batch.slot].set(after)), batch, made)


def keep(state: State, rows: Any, made: jax.Array) -> State:
    """The state with the last tokens made int32[R] of rows that return one. rows: slot and output, int32[R] each."""
    last = jnp.where((rows.output & TOKEN) > 0, made, state.last[rows.slot])
    return state._replace(last=state.last.at[rows.slot].set(last))


def lower_step(plan: Plan, tokens: int, taps: tuple[str, ...] = ()) -> jax.stages.Lowered:
    """The step of the bucket of `tokens` tokens, traced from shapes alone, caches and state donated."""
    shape, whole = make_shape(tokens, plan.limits), PartitionSpec()

    def step(weights: Any, cache: Any, state: State, packed: jax.Array) -> Any:
        return run(plan, shape, taps, weights, cache, state, packed)

    cache_specs, state_specs = caches.specs(plan.limits)
    weight_specs = params.map_leaves(lambda leaf: leaf.hold(leaf.spec), plan.leaves)
    local = jax.shard_map(
        step,
        mesh=plan.mesh,
        in_specs=(weight_specs, cache_specs, state_specs, whole),
        out_specs=(cache_specs, state_specs, whole, Kept(dealt.ROWS, whole), whole),
        check_vma=False,
    )
    return jax.jit(local, donate_argnums=(1, 2)).lower(
        params.shapes(plan.leaves, plan.config, plan.mesh),
        caches.cache_shapes(plan.limits, plan.config, plan.mesh),
        caches.state_shapes(plan.limits, plan.mesh),
        jax.ShapeDtypeStruct((shape.size,), jnp.int32, sharding=replicated(plan.mesh)),
    )


def lower_edit(plan: Plan) -> jax.stages.Lowered:
    """The program ahead of a step with more page-table edits than its bucket holds. State donated."""
    edits = jax.ShapeDtypeStruct((EDITS, 3), jnp.int32, sharding=replicated(plan.mesh))
    shardings = jax.tree.map(lambda s: s.sharding, caches.state_shapes(plan.limits, plan.mesh))
    return jax.jit(edit, donate_argnums=0, out_shardings=shardings).lower(
        caches.state_shapes(plan.limits, plan.mesh), edits
    )
