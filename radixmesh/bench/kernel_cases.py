"""The cases of `radixmesh bench kernels`: a list that every kernel adds to."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
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
GUESSED = 8
"""Tokens that a row feeds as a tree: one tile."""
LINE = 2 * KV_HEADS * HEAD * 2
"""Bytes of one token in the cache."""
RANKS = {"decode": -2, "verify tree": -1}
"""Of the loops of depth 2 by length, that of tiles of 1 and of 8 queries; what ends a large one is shorter."""
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
    """Turns of `keys` keys, and what the work needs. One row: a whole prompt. Several: a token each, or a few."""
    if rows > 1:
        turns, pairs, read = rows * -(-REACH // keys), tokens * REACH, rows * REACH
    else:
        size = tile(tokens, chip())
        turns = sum(-(-(i + size) // keys) for i in range(0, tokens, size))
        pairs, read = tokens * tokens // 2, tokens
    both = 2 * tokens * Q_HEADS * HEAD * 2
    return {"turns": turns, "moved": read * LINE + both, "flops": 4 * pairs * Q_HEADS * HEAD}


def _cuts(form: Form, tokens: int) -> tuple[int, int]:
    """Of all tiles of a prompt: cuts that have a mask, and that have none."""
    tiles = range(0, tokens, form.most)
    plain = sum((i + 1) // form.step for i in tiles) if form.plain else 0
    return sum(-(-(i + form.most) // form.step) for i in tiles) - plain, plain


def _ours() -> list[Case]:
    out = []
    guessed = ROWS * GUESSED
    for name, tokens, rows in (("decode", ROWS, ROWS), ("verify tree", guessed, ROWS), ("prefill", PROMPT, 1)):

        def lower(shape: Shape, name: str = name, tokens: int = tokens) -> Any:
            def call(*given: Any, tree: attention.Tree | None) -> Any:
                return attention.attention(*given, tree=tree, kv_heads=KV_HEADS, scale=HEAD**-0.5)

            many = shape((min(tokens, ROWS + tokens // 64),), I32)
            nodes = attention.Tree(shape((ROWS,), I32), shape((tokens,), I32), shape((2, tokens), I32))
            return jax.jit(call).lower(
                shape((tokens, Q_HEADS, HEAD), BF16),
                shape((PAGES, PAGE, 2 * KV_HEADS * HEAD), BF16),
                attention.Tiles(many, many, many, many, shape((), I32)),
                shape((ROWS, 512), I32),
                shape((ROWS,), I32),
                shape((), I32),
                tree=nodes if name == "verify tree" else None,
            )

        form = Form(q_heads=Q_HEADS, kv_heads=KV_HEADS, head=HEAD, page=PAGE, entries=512)
        form = replace(form, blocks=attention.choose(form, tokens, 2, chip()))
        out.append(
            Case(
                name=f"attention {name}",
                lower=lower,
                rank=RANKS.get(name, -1),
                depth=2,
                trips=form.pieces // form.ahead,
                cuts=_cuts(form, tokens) if rows == 1 else None,
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

    return Case(name=f"kv_write {tokens}", lower=lower, kernel="kv_write")


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
    """tpu-inference's, which writes too: a kernel for rows of one token and one for others, of which a case has work
    for one: what the other takes is not counted."""

    def lower(shape: Shape, tokens: int) -> Any:
        def call(*given: Any) -> Any:
            return module.ragged_paged_attention(
                *given,
                sm_scale=HEAD**-0.5,
                d_block_sizes=(1, 512, 1, 512),
                m_block_sizes=(64, 512, 64, 512),
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
        Case(
            name=f"v3 {name}",
            lower=partial(lower, tokens=tokens),
            kernel=kernel,
            around=True,
            **_work(tokens, rows, 512),
        )
        for name, tokens, rows, kernel in (("decode", ROWS, ROWS, "RPAd"), ("prefill", PROMPT, 1, "RPAm"))
    ]
