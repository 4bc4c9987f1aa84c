"""A layer's attention by the kernels, interpreted, is the layer's attention in plain XLA: from a step's rows on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from backends.jax import attend
from backends.jax.caches import HELD, State
from backends.jax.inputs import Batch, plan_tiles
from engine.mesh import MeshSpec
from engine.model.spec import EIGHT, Attention
from tests.kernels.cases import INTERPRET, races

WIDTH, ROWS, TOKENS, TILE = 12, 6, 40, 8


def step(draw: np.random.Generator, window: int | None, size: int) -> tuple[Batch, Any, Any, Any]:
    """A random batch with padded rows and tokens, the lengths before it, the state, and the limits. size: of a page."""
    lens = draw.permutation([0, 1, 1, int(draw.integers(2, 24)), 4, 0]).astype(np.int32)
    before = np.where(lens > 0, draw.choice([0, 15, 16, 17, 90, 140], ROWS), 0).astype(np.int32)
    first, total = np.cumsum(lens, dtype=np.int32) - lens, int(lens.sum())
    row = np.concatenate([np.repeat(np.arange(ROWS), lens), np.zeros(TOKENS - total, np.int64)]).astype(np.int32)
    base = np.maximum(before - (window or 10**6) + 1, 0) // size * size
    tiles = np.zeros((ROWS + TOKENS // TILE, 3), np.int32)
    planned = plan_tiles(lens, first, TILE)
    tiles[: len(planned)] = planned
    batch = Batch(**dict.fromkeys(Batch._fields))._replace(
        tokens=jnp.zeros(TOKENS, jnp.int32),
        row=jnp.asarray(row),
        real=jnp.arange(TOKENS) < total,
        slot=jnp.arange(ROWS),
        length=jnp.asarray(lens),
        first=jnp.asarray(first),
        base=jnp.asarray(base[None], jnp.int32),
        tiles=jnp.asarray(tiles),
        tile_count=jnp.int32(len(planned)),
    )
    table = draw.permutation(ROWS * WIDTH).reshape(ROWS, WIDTH).astype(np.int32)
    group = SimpleNamespace(page=size, window=window or 0)
    limits = SimpleNamespace(groups=(group,), max_row_pages=(WIDTH,), pages=(ROWS * WIDTH,))
    return batch, jnp.asarray(before), State(None, None, jnp.asarray(table)), limits


@pytest.mark.parametrize(
    ("seed", "window", "size", "held"),
    [
        (0, None, 16, "float32"),
        (1, 20, 16, "float32"),
        (2, 20, 64, "float32"),
        (3, 20, 32, "int8"),
        (4, None, 64, "fp8"),
    ],
)
def test_a_layer_by_the_kernels_is_the_layer_in_plain_xla(seed: int, window: int | None, size: int, held: str) -> None:
    draw = np.random.default_rng(seed)
    batch, before, state, limits = step(draw, window, size)
    a = Attention(q_heads=4, kv_heads=2, head_dim=64, rope=None, scale=0.125, window=window, cap=20.0, sinks=True)
    config: Any = SimpleNamespace(platform="tpu", cache_dtype=held, mesh=MeshSpec())
    shape: Any = SimpleNamespace(tile=TILE, tiles=len(batch.tiles), tokens=TOKENS)
    position = before[batch.row] + jnp.arange(TOKENS) - batch.first[batch.row]
    q, k, v = (jnp.asarray(draw.normal(size=(TOKENS, h, 64)), jnp.float32) for h in (4, 2, 2))
    kind, eight = HELD[held], held in EIGHT
    cache = jnp.asarray(draw.normal(size=(2 * ROWS * WIDTH, size, 2 * 2 * 64)) * (40 if eight else 1), kind)
    read = jnp.asarray(draw.uniform([[0.02], [0.005]], [[0.03], [0.009]], (2, 2)), jnp.float32)
    scales = (read, 1 / read) if eight else None
    sinks = jnp.asarray(draw.normal(size=4), jnp.float32)
    groups = attend.locate(batch, state, position, limits)
    view = attend.look(batch, before, position, groups, shape, config)
    want = attend.plain(a, q, k, v, sinks, cache, 1, view.groups[0], view, scales)
    with pltpu.force_tpu_interpret_mode(INTERPRET):
        got = jax.block_until_ready(attend.paged(a, q, k, v, sinks, cache, 1, view.groups[0], view, scales))
    assert not races()
    real = np.asarray(batch.real)
    assert np.abs(np.asarray(got[0] - want[0])[real]).max() < 1e-5
    assert not np.asarray(got[0])[~real].any()
    assert np.array_equal(*(np.asarray(x[1]).view(np.uint8) for x in (got, want)))


def guess(draw: np.random.Generator, batch: Batch) -> Any:
    """Parents of random trees, after a chain of a few tokens; one row is none."""
    parents = np.full(TOKENS, -1, np.int32)
    for first, length in list(zip(batch.first.tolist(), batch.length.tolist(), strict=True))[:-3]:
        for i in range(1 + min(length // 4, 2), length):
            parents[first + i] = draw.integers(max(0, i - 3), i)
    return parents


def exact(a: Attention, q: Any, sinks: Any, cache: Any, batch: Batch, before: Any, table: Any, parents: Any) -> Any:
    """Attention over the cache as it was left, in float64: of each real token, and where it stands."""
    out, stands = np.zeros(q.shape), np.zeros(TOKENS, int)
    q, cache, base, size = np.float64(q), np.float64(cache)[ROWS * WIDTH :], np.asarray(batch.base[0]), cache.shape[1]
    for t in range(int(batch.real.sum())):
        r = int(batch.row[t])
        first, length = int(batch.first[r]), int(before[r])
        path = [t - first]
        while path[-1]:
            follows = parents[first + path[-1]]
            path.append(follows if follows >= 0 else path[-1] - 1)
        stands[t] = length + len(path) - 1
        seen = np.array([*range(length), *(length + j for j in path[::-1])])[-(a.window or 0) :]
        lines = cache[table[r, (seen - base[r]) // size], seen % size].reshape(len(seen), a.kv_heads, 2, a.head_dim)
        for h in range(a.q_heads):
            k, v = lines[:, h * a.kv_heads // a.q_heads].transpose(1, 0, 2)
            s = np.append(a.cap * np.tanh(k @ q[t, h] * a.scale / a.cap), float(sinks[h]))
            p = np.exp(s - s.max())
            out[t, h] = (p / p.sum())[:-1] @ v
    return out, stands


@pytest.mark.parametrize(("seed", "window"), [(5, None), (7, 5)])
def test_guesses_as_trees(seed: int, window: int | None) -> None:
    """From parents on, by the kernels and in plain XLA, trees and other rows in one step."""
    draw = np.random.default_rng(seed)
    batch, before, state, limits = step(draw, window, 16)
    a = Attention(q_heads=4, kv_heads=2, head_dim=64, rope=None, scale=0.125, window=window, cap=20.0, sinks=True)
    config: Any = SimpleNamespace(platform="tpu", cache_dtype="float32", mesh=MeshSpec())
    shape: Any = SimpleNamespace(tile=TILE, tiles=len(batch.tiles), tokens=TOKENS)
    position = before[batch.row] + jnp.arange(TOKENS) - batch.first[batch.row]
    q, k, v = (jnp.asarray(draw.normal(size=(TOKENS, h, 64)), jnp.float32) for h in (4, 2, 2))
    cache = jnp.asarray(draw.normal(size=(2 * ROWS * WIDTH, 16, 2 * 2 * 64)), jnp.float32)
    sinks, parents = jnp.asarray(draw.normal(size=4), jnp.float32), guess(draw, batch)
    groups = attend.locate(batch, state, position, limits)
    view = attend.look(batch, before, position, groups, shape, config, jnp.asarray(parents))
    plain = attend.plain(a, q, k, v, sinks, cache, 1, view.groups[0], view)
    with pltpu.force_tpu_interpret_mode(INTERPRET):
        paged = jax.block_until_ready(attend.paged(a, q, k, v, sinks, cache, 1, view.groups[0], view))
    assert not races()
    right, stands = exact(a, q, sinks, plain[1], batch, before, np.asarray(state.tables), parents)
    real = np.asarray(batch.real)
    assert np.array_equal(np.asarray(view.position)[real], stands[real])
    for got in (plain, paged):
        assert np.abs(np.asarray(got[0]) - right)[real].max() < 1e-5


def test_trees_are_refused_by_name_where_no_kernel_sees_them() -> None:
    a = Attention(q_heads=4, kv_heads=2, head_dim=64, rope=None, scale=0.125)
    config: Any = SimpleNamespace(
        platform="gpu", dtype="bfloat16", cache_dtype="bfloat16", mesh=MeshSpec(), page=16, max_rows=8, max_len=512
    )
    assert "guesses as trees are not built" in attend.choose(a, config, tree=8)[1]
    config.platform, config.max_tokens = "tpu", 512
    assert attend.choose(a, config, tree=64)[0] is attend.paged
    kernel, why = attend.choose(a, config, tree=65)
    assert kernel is attend.plain
    assert "trees of 65 tokens are not built, the most is 64" in why
