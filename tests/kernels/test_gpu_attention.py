"""The GPU's kernels, interpreted, against softmax(q k) v in numpy; and compiled to Triton's IR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from kernels_pallas import gpu_attention as kernel
from kernels_pallas import gpu_row

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
    "mixed": Case(rows=((129, 1), (31, 33), (64, 1), (15, 2), (0, 17)), group=3),
    "window over freed pages": Case(rows=((180, 1), (170, 9), (133, 1)), window=40, base=5),
    "sinks and cap": Case(rows=((90, 1), (0, 20)), sinks=True, cap=2.0, cuts=4),
}
MORE = {
    "page of one": Case(rows=((65, 1), (0, 9)), page=1, heads=1),
    "decode, cut": Case(rows=((63, 1), (0, 1), (200, 1)), cuts=4),
    "one": Case(rows=((0, 1),), cuts=4),
    "decode": Case(rows=((63, 1), (64, 1), (15, 1), (16, 1), (200, 1)), cuts=1),
    "prefill": Case(rows=((0, 70), (0, 1), (5, 33))),
    "more": Case(rows=((129, 1), (31, 64), (64, 65), (15, 2), (0, 17)), group=4),
    "many heads": Case(rows=((40, 9), (70, 1)), heads=1, group=11, page=8),
    "window": Case(rows=((100, 1), (90, 40), (0, 20), (3, 1)), window=21),
    "window, cut": Case(rows=((150, 1), (8, 1)), window=100, cuts=4),
    "sinks": Case(rows=((90, 1), (0, 1), (0, 34)), sinks=True),
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


def equal(case: Case) -> None:
    m = made(case, jnp.float32)
    np.testing.assert_allclose(np.asarray(run(case, m)), plain(case, m), atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_equals_softmax(name: str) -> None:
    equal(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_forms_equal_softmax(name: str) -> None:
    equal(MORE[name])


def test_wide_tiles_equal_softmax() -> None:
    """bfloat16 has the tiles of tensor cores: several queries a tile, several turns, the last of them ragged."""
    case = Case(rows=((40, 70), (129, 1)), heads=1, group=4)
    m = made(case, jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(run(case, m), np.float32), plain(case, m), atol=2e-2)


def test_written_tokens_stand_in_their_pages() -> None:
    """And nothing else changes; a token of no page is dropped."""
    r = np.random.default_rng(0)
    k, v = (r.standard_normal((5, 3, DIM)).astype(np.float32) for _ in range(2))
    cache = r.standard_normal((LAYERS * 4, 2, 3 * 2 * DIM)).astype(np.float32)
    page, offset = np.array([3, -1, 0, 3, 2], np.int32), np.array([1, 0, 0, 0, 1], np.int32)
    want = cache.reshape(LAYERS * 4, 2, 3, 2, DIM).copy()
    for i in np.flatnonzero(page >= 0):
        want[4 + page[i], offset[i], :, 0], want[4 + page[i], offset[i], :, 1] = k[i], v[i]
    got = kernel.write(*(jnp.asarray(x) for x in (k, v, cache, page, offset, np.array([4], np.int32))), interpret=True)
    assert (np.asarray(got) == want.reshape(cache.shape)).all()


def test_row_times_equals_a_product() -> None:
    r = np.random.default_rng(0)
    x, w = r.standard_normal((1, 768)).astype(np.float32), r.standard_normal((12, 768)).astype(np.float32)
    given = jnp.asarray(x), jnp.asarray(w)
    assert not gpu_row.supports(*given)
    got = gpu_row.row_times(*given, jnp.dtype(jnp.float32), interpret=True)
    np.testing.assert_allclose(np.asarray(got), x.astype(np.float64) @ w.T.astype(np.float64), atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "out", "inner", "says"), [(2, 8, 768, "2 rows"), (1, 9, 768, "groups of"), (1, 8, 640, "chunks of")]
)
def test_products_that_the_row_kernel_is_not_for(rows: int, out: int, inner: int, says: str) -> None:
    assert says in gpu_row.supports(jnp.zeros((rows, inner)), jnp.zeros((out, inner)))


@pytest.mark.parametrize(
    ("head", "group", "dtype", "says"),
    [(96, 4, "bfloat16", "power of two"), (64, 17, "bfloat16", "query heads"), (64, 4, "int8", "int8")],
)
def test_layers_that_the_kernels_are_not_for(head: int, group: int, dtype: str, says: str) -> None:
    assert says in kernel.supports(head, group, "bfloat16", dtype)
    assert not kernel.supports(128, 8, "bfloat16", "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_become_triton(dtype: str) -> None:
    """Every form becomes Triton's IR, on a machine without a GPU."""
    for name in CASES:
        case = CASES[name]
        m = made(case, jnp.dtype(dtype))
        del m["keys"]
        traced = jax.jit(lambda m, case=case: run(case, m, interpret=False)).trace(m)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("__gpu$xla.gpu.triton") >= 2, name
