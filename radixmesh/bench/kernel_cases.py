"""The cases of `radixmesh bench kernels`: a list that every kernel adds to."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import attention, kv_write
from kernels_pallas.blocks import KEYS, tile
from kernels_pallas.chip import chip
from kernels_pallas.form import Form
from radixmesh.bench import matmul_cases
from radixmesh.bench.kernels import Case, Shape

Q_HEADS, KV_HEADS, HEAD, PAGE, PAGES = 32, 8, 128, 16, 8192
"""Attention of an 8B Llama, and its cache of one layer."""
ROWS, REACH, PROMPT = 64, 1536, 2048
"""Rows that decode and how far they reach; tokens of a prompt."""
LINE = 2 * KV_HEADS * HEAD * 2
"""Bytes of one token in the cache."""
I32, BF16 = jnp.int32, jnp.bfloat16


def cases(v3: ModuleType | None) -> list[Case]:
    """v3: tpu-inference's kernel, where it is there."""
    return [
        *_ours(),
        _write(ROWS, ROWS),
        _write(PROMPT, PROMPT // PAGE),
        *_builtin(),
        *(_v3(v3) if v3 else []),
        *matmul_cases.cases(),
    ]


def _work(tokens: int, rows: int, keys: int) -> dict[str, Any]:
    """Turns of `keys` keys, and what the work needs. One row: a whole prompt. Several: a token each."""
    if rows > 1:
        turns, pairs, read = rows * -(-REACH // keys), rows * REACH, rows * REACH
    else:
        size = tile(tokens, chip())
        turns = sum(-(-(i + size) // keys) for i in range(0, tokens, size))
        pairs, read = tokens * tokens // 2, tokens
    both = 2 * tokens * Q_HEADS * HEAD * 2
    return {"turns": turns, "moved": read * LINE + both, "flops": 4 * pairs * Q_HEADS * HEAD}


def _ours() -> list[Case]:
    out = []
    for name, tokens, rows in (("decode", ROWS, ROWS), ("prefill", PROMPT, 1)):

        def lower(shape: Shape, tokens: int = tokens, rows: int = rows) -> Any:
            def call(q: Any, cache: Any, tiles: Any, table: Any, base: Any, at: Any) -> Any:
                return attention.attention(q, cache, tiles, table, base, at, kv_heads=KV_HEADS, scale=HEAD**-0.5)

            many = shape((min(tokens, ROWS + tokens // 64),), I32)
            return jax.jit(call).lower(
                shape((tokens, Q_HEADS, HEAD), BF16),
                shape((PAGES, PAGE, 2 * KV_HEADS * HEAD), BF16),
                attention.Tiles(many, many, many, many, shape((), I32)),
                shape((ROWS, 512), I32),
                shape((ROWS,), I32),
                shape((), I32),
            )

        form = Form(q_heads=Q_HEADS, kv_heads=KV_HEADS, head=HEAD, page=PAGE, entries=512)
        form = replace(form, blocks=attention.choose(form, tokens, 2, chip()))
        # decode runs as the smallest tile, a prompt as the largest
        out.append(
            Case(
                name=f"attention {name}",
                lower=lower,
                least=rows > 1,
                trips=form.stages // form.ahead,
                **_work(tokens, rows, KEYS[chip().name]),
            )
        )
    return out


def _write(tokens: int, pages: int) -> Case:
    def lower(shape: Shape) -> Any:
        many = shape((pages,), I32)
        return jax.jit(kv_write.write, donate_argnums=1).lower(
            shape((tokens, 2 * KV_HEADS * HEAD), BF16),
            shape((PAGES, PAGE, 2 * KV_HEADS * HEAD), BF16),
            kv_write.Spots(many, many, many, many, shape((), I32)),
            shape((), I32),
        )

    return Case(name=f"kv_write {tokens}", lower=lower)


def _builtin() -> list[Case]:
    """jax's own, which does not write; 512 keys a turn as ours. A block of queries is several rows, each computed with
    all of them."""
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as theirs

    def lower(shape: Shape, tokens: int, queries: int) -> Any:
        def call(*given: Any) -> Any:
            return theirs.ragged_paged_attention(
                *given,
                sm_scale=HEAD**-0.5,
                num_kv_pages_per_block=512 // PAGE,
                num_queries_per_block=queries,
                vmem_limit_bytes=chip().vmem * 3 // 4,
            )

        return jax.jit(call).lower(
            shape((tokens, Q_HEADS, HEAD), BF16),
            shape((PAGES, PAGE, 2 * KV_HEADS, HEAD), BF16),
            shape((ROWS,), I32),
            shape((ROWS, 512), I32),
            shape((ROWS + 1,), I32),
            shape((1,), I32),
        )

    return [
        Case(name="jax decode", lower=lambda shape: lower(shape, ROWS, 8), **_work(ROWS, ROWS, 512)),
        Case(name="jax prefill", lower=lambda shape: lower(shape, PROMPT, 64), **_work(PROMPT, 1, 512)),
    ]


def _v3(module: ModuleType) -> list[Case]:
    """tpu-inference's, which writes too. It is several kernels, whose loops were not told apart: no cycles."""

    def lower(shape: Shape, tokens: int, sizes: tuple[int, int, int, int]) -> Any:
        def call(*given: Any) -> Any:
            return module.ragged_paged_attention(
                *given,
                sm_scale=HEAD**-0.5,
                d_block_sizes=(1, 512, 1, 512),
                p_block_sizes=sizes,
                m_block_sizes=sizes,
            )

        return jax.jit(call, donate_argnums=3).lower(
            shape((tokens, Q_HEADS, HEAD), BF16),
            shape((tokens, KV_HEADS, HEAD), BF16),
            shape((tokens, KV_HEADS, HEAD), BF16),
            shape(module.get_kv_cache_shape(PAGES, PAGE, KV_HEADS, HEAD, BF16), BF16),
            shape((ROWS,), I32),
            shape((ROWS * 512,), I32),
            shape((ROWS + 1,), I32),
            shape((3,), I32),
        )

    return [
        Case(name="v3 decode", lower=lambda shape: lower(shape, ROWS, (64, 512, 64, 512))),
        Case(name="v3 prefill", lower=lambda shape: lower(shape, PROMPT, (64, 512, 64, 512))),
    ]
