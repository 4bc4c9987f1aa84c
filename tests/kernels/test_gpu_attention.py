"""The GPU's paged attention, interpreted, against softmax(q k) v in numpy; and compiled to Triton's IR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from kernels_pallas import gpu_attention as kernel

F32 = NDArray[np.float32]
DIM, LAYERS = 16, 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """rows: (cached positions before, tokens fed). base: of each row's page table, in pages."""

    rows: tuple[tuple[int, int], ...]
    heads: int = 2
    group: int = 2
    page: int = 16
    cap: float | None = None
    window: int | None = None
    sinks: bool = False
    spare: int = 3
    base: int = 0
    cuts: int | None = None


CASES = {
    "one": Case(rows=((0, 1),), cuts=4),
    "decode": Case(rows=((63, 1), (64, 1), (15, 1), (16, 1), (200, 1)), cuts=1),
    "decode, cut": Case(rows=((63, 1), (64, 1), (0, 1), (300, 1)), cuts=4, group=3),
    "prefill": Case(rows=((0, 70), (0, 1), (5, 33))),
    "mixed": Case(rows=((129, 1), (31, 64), (64, 65), (15, 2), (0, 17)), group=4),
    "many heads": Case(rows=((40, 9), (70, 1)), heads=1, group=11, page=8),
    "window": Case(rows=((100, 1), (90, 40), (0, 20), (3, 1)), window=21),
    "window, cut": Case(rows=((150, 1), (8, 1)), window=100, cuts=4),
    "window over freed pages": Case(rows=((180, 1), (170, 9)), window=40, base=8),
    "cap": Case(rows=((20, 1), (0, 40)), cap=2.0, group=1),
    "sinks": Case(rows=((90, 1), (0, 1), (0, 34)), sinks=True),
    "sinks, cut": Case(rows=((90, 1), (0, 1)), sinks=True, cuts=8),
    "page of one": Case(rows=((65, 1), (0, 66)), page=1, heads=1),
}


def made(case: Case, dtype: Any, seed: int = 0) -> dict[str, Any]:
    """Random queries, and a cache whose unread parts are NaN."""
    r = np.random.default_rng(seed)
    lens, before = np.array([n for _, n in case.rows]), np.array([b for b, _ in case.rows])
    tokens = int(lens.sum()) + case.spare
    q = r.standard_normal((tokens, case.heads, case.group, DIM)).astype(np.float32)
    base = np.full(len(lens), case.base * case.page)
    entries = int(-(-(before + lens - base).max() // case.page))
    pages = r.permutation(len(lens) * entries + 2)
    table = pages[: len(lens) * entries].reshape(len(lens), entries)
    cache = np.full((LAYERS, len(pages), case.page, case.heads, 2, DIM), np.nan, np.float32)
    keys = []
    for row, (b, n) in enumerate(case.rows):
        kv = r.standard_normal((b + n, case.heads, 2, DIM)).astype(np.float32)
        least = 0 if case.window is None else max(0, b - case.window + 1)
        for at in range(least, b + n):
            cache[1, table[row, (at - base[row]) // case.page], at % case.page] = kv[at]
        keys.append(np.asarray(jnp.asarray(kv, dtype), np.float32))
    return {
        "q": jnp.asarray(q, dtype),
        "cache": jnp.asarray(cache.reshape(-1, case.page, case.heads * 2 * DIM), dtype),
        "pages": kernel.Pages(*(jnp.asarray(x, jnp.int32) for x in (table, base, [len(pages)]))),
        "lens": jnp.asarray(lens, jnp.int32),
        "before": jnp.asarray(before, jnp.int32),
        "first": jnp.asarray(np.cumsum(lens) - lens, jnp.int32),
        "sinks": jnp.asarray(r.standard_normal(case.heads * case.group), jnp.float32) if case.sinks else None,
        "keys": keys,
    }


def run(case: Case, m: dict[str, Any], *, interpret: bool = True) -> jax.Array:
    """Rows of one token through `single`, the others through `tiled`, as a step would."""
    form = kernel.Form(scale=DIM**-0.5, cap=case.cap, window=case.window)
    alone = m["lens"] == 1
    row = jnp.arange(len(case.rows), dtype=jnp.int32)
    items = kernel.Items(m["first"], row, jnp.where(alone, m["before"], -1))
    size = kernel.width(case.group, kernel.sizes(m["q"].dtype)[0])
    tiles = kernel.plan_tiles(m["lens"], m["first"], m["before"], m["q"].shape[0], size)
    given = m["cache"], m["pages"], m["sinks"], form
    o = kernel.single(m["q"], given[0], items, *given[1:], cuts=case.cuts, interpret=interpret)
    return kernel.tiled(o, given[0], tiles, *given[1:], interpret=interpret)


def plain(case: Case, m: dict[str, Any]) -> F32:
    """What it should be, in float64; the queries of tokens that no row has."""
    q = np.asarray(m["q"], np.float64)
    out, at = q.copy(), 0
    sinks = None if m["sinks"] is None else np.asarray(m["sinks"], np.float64).reshape(case.heads, case.group, 1)
    for (before, n), kv in zip(case.rows, m["keys"], strict=True):
        for j in range(n):
            position = before + j
            least = 0 if case.window is None else max(0, position - case.window + 1)
            k, v = (kv[least : position + 1, :, side].astype(np.float64) for side in (0, 1))
            s = np.einsum("hgd,khd->hgk", q[at], k) * DIM**-0.5
            s = s if case.cap is None else case.cap * np.tanh(s / case.cap)
            s = s if sinks is None else np.concatenate([s, sinks], 2)
            p = np.exp(s - s.max(2, keepdims=True))
            p = (p / p.sum(2, keepdims=True))[:, :, : len(k)]
            out[at] = np.einsum("hgk,khd->hgd", p, v)
            at += 1
    return out.astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_equals_softmax(name: str) -> None:
    case = CASES[name]
    m = made(case, jnp.float32)
    np.testing.assert_allclose(np.asarray(run(case, m)), plain(case, m), atol=2e-6)
