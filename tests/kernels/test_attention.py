"""Attention and KV write, interpreted with race detection against plain references; planted faults are caught."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import attention as ours
from kernels_pallas import kv_write
from kernels_pallas.blocks import TREE, Blocks
from kernels_pallas.chip import Chip
from tests.kernels.cases import (
    ENTRIES,
    INTERPRET,
    KINDS,
    PAGE,
    ROWS,
    TOKENS,
    Case,
    Kind,
    Row,
    draw_trees,
    make,
    races,
    want,
)

BLOCKS = Blocks(queries=(1, 4, 8), keys=256, large=8, step=128, ahead=2, apart=True)
ONE = Blocks(queries=BLOCKS.queries[-1:], keys=128, large=64)
"""The same body once: it compiles sooner."""
SMALL = Chip(name="v5e", vmem=16 << 20, smem=1 << 20)
FITS: dict[str, Any] = {"q_heads": 32, "kv_heads": 8, "head": 128, "page": 16, "rows": 64, "entries": 512}


@cache
def program(kind: Kind) -> Any:
    return jax.jit(partial(call, ours, kind))


def call(
    module: ModuleType, kind: Kind, q: Any, lines: Any, tiles: Any, total: Any, *rest: Any, blocks: Blocks = BLOCKS
) -> Any:
    table, base, at, sinks, scales, *tree = rest
    return module.attention(
        q,
        lines,
        module.Tiles(*tiles.T, total),
        table,
        base,
        at,
        sinks if kind.sinks else None,
        scales if kind.scaled else None,
        module.Tree(*tree) if tree else None,
        kv_heads=kind.kv_heads,
        scale=kind.head**-0.5,
        window=kind.window,
        cap=kind.cap,
        blocks=blocks,
        interpret=INTERPRET,
    )


def given(case: Case) -> tuple[Any, ...]:
    arrays = jnp.asarray(case.q, case.kind.asks), jnp.asarray(case.cache, case.kind.dtype)
    numbers = case.tiles, np.int32(case.total), case.table, case.base, np.int32(case.at)
    return *arrays, *numbers, case.sinks, case.scales


def worst(case: Case, out: Any) -> float:
    """The largest difference from the reference; infinite where the kernel raced or made NaN."""
    right = want(case)
    got = np.asarray(out.astype(jnp.float32))[: len(right)]
    if races() or not np.isfinite(got).all():
        return np.inf
    return float(np.abs(got - right).max(initial=0))


def limit(kind: Kind) -> float:
    return 2e-2 if kind.asks == "bfloat16" else 1e-5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", KINDS)
def test_attention_is_the_reference(name: str, seed: int) -> None:
    case = make(KINDS[name], seed, BLOCKS.queries[-1])
    assert worst(case, program(case.kind)(*given(case))) < limit(case.kind)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
@pytest.mark.parametrize("name", KINDS)
def test_attention_is_the_reference_more_often(name: str, seed: int) -> None:
    test_attention_is_the_reference(name, seed)


def with_trees(kind: Kind, seed: int, rows: list[Row] | None = None) -> Case:
    """A case with trees among its rows."""
    rows = rows or draw_trees(np.random.default_rng(1000 + seed))
    return make(kind, seed, BLOCKS.queries[-1], rows, TOKENS + TREE, BLOCKS.small)


@pytest.mark.parametrize(("name", "seed"), [("int8", 0)])
def test_guesses_as_trees_see_whom_they_follow(name: str, seed: int) -> None:
    case = with_trees(KINDS[name], seed)
    assert any(len(row.parents) > 28 for row in case.rows)
    assert worst(case, program(case.kind)(*given(case), *case.tree)) < limit(case.kind)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
@pytest.mark.parametrize("name", KINDS)
def test_guesses_as_trees_see_whom_they_follow_more_often(name: str, seed: int) -> None:
    test_guesses_as_trees_see_whom_they_follow(name, seed)


@pytest.mark.parametrize("bit", [None, 19, 52], ids=["right", "whom it follows is not seen", "a sibling is seen"])
def test_a_wrong_bit_of_a_tree_is_caught(bit: int | None) -> None:
    """Of a tree of two branches around a page's edge, its last token."""
    kind, parents = KINDS["float32"], tuple(max(0, i - 2) for i in range(1, TREE))
    case = with_trees(kind, 3, [Row(1, 40), Row(TREE, 3 * PAGE - 1, parents), *[Row(0, 0)] * 4])
    root, stands, bits = case.tree
    if bit is not None:
        assert bool(bits[bit // 32, TREE] >> bit % 32 & 1) == (bit == 19)
        bits[bit // 32, TREE] ^= 1 << bit % 32
    assert (worst(case, program(kind)(*given(case), root, stands, bits)) < limit(kind)) == (bit is None)


def test_no_rows_and_the_edges_of_pages() -> None:
    kind = KINDS["float32"]
    edges = [Row(0, 40), Row(1, PAGE - 1), Row(1, PAGE), Row(4, 127), Row(9, 128), Row(1, 0)]
    for rows in ([Row(0, 0)] * ROWS, edges):
        case = make(kind, 7, BLOCKS.queries[-1], rows)
        assert worst(case, program(kind)(*given(case))) < limit(kind)


CUTS = Blocks(queries=BLOCKS.queries[-1:], keys=256, large=8, step=128, ahead=2)
"""The body of large tiles alone."""
EDGE = [Row(4, 126), Row(4, 127), Row(4, 128), Row(0, 0), Row(0, 0), Row(2, 255)]
"""The first position of a tile is one before, at and after what a cut's last key sees, and the edge of a block."""


@pytest.mark.parametrize("change", [{}, {"window": 135, "sinks": True, "cap": 3.0}], ids=["", "window, sinks, cap"])
def test_cuts_without_a_mask_begin_and_end_where_all_see_them(change: dict[str, Any]) -> None:
    case = make(replace(KINDS["float32"], **change), 9, BLOCKS.queries[-1], EDGE)
    assert worst(case, call(ours, case.kind, *given(case), blocks=CUTS)) < limit(case.kind)


@pytest.mark.slow
def test_a_tile_begins_and_ends_in_parts() -> None:
    """Of 32 queries of a product, by two products."""
    kind, most = Kind(q_heads=24, kv_heads=6, head=128, dtype="float32"), 64
    case = make(kind, 9, most, [Row(most, 20), Row(29, 0), *[Row(0, 0)] * (ROWS - 2)], 96)
    assert worst(case, call(ours, kind, *given(case), blocks=replace(CUTS, queries=(most,)))) < limit(kind)


FAULTS = {
    "keys are not waited for": ("_fetch(form, r, i, b, half, start=False)", "pass"),
    "output is overwritten while it is copied": ("_give(r, i - 2, start=False)", "pass"),
    "blocks go to one buffer": ("into = r.keys.at[half,", "into = r.keys.at[0,"),
    "page off by one": ("source = r.table[entry + p] + r.at[0]", "source = r.table[entry + p + 1] + r.at[0]"),
    "what nobody sees is not cleared": ("_clear(form, r, i, b, half)\n", "pass\n"),
    "a query does not see itself": ("seen = key <= query", "seen = key < query"),
    "a guess sees none of its tree": ("seen &= (bit < 0) |", "seen &= (bit < 0) &"),
    "the words of a tree are taken for each other": ("jnp.where(bit < 32, low", "jnp.where(bit >= 32, low"),
    "a query of a large tile does not see itself": ("seen = last >= key", "seen = last > key"),
    "weights of one product meet another's values": ("r.values[age, u],\n", "r.values[1 - age, u],\n"),
    "what a tile left in the pipeline goes to the next": ("        reset(form, r, u)\n", "        pass\n"),
    "the mask is left out one cut too many": ("form.step <= position + 1", "form.step <= position + 2"),
    "a cut that is seen is left out": ("jnp.minimum(last + 1,", "jnp.minimum(last,"),
}
TREES = list(FAULTS)[6:8]
SLOW = [list(FAULTS)[i] for i in (4, 5, 6, 10, 12)]
"""Faults that `make test-all` plants alone."""
LONG = [Row(1, 290), Row(5, 126), Row(0, 0), Row(1, 0), Row(9, 250), Row(1, 31)]


@pytest.mark.parametrize("fault", [pytest.param(f, marks=pytest.mark.slow if f in SLOW else []) for f in FAULTS])
def test_a_planted_fault_is_caught(fault: str) -> None:
    from tests.kernels.cases import planted

    place, above = list(FAULTS).index(fault), ["kernels_pallas.ragged", "kernels_pallas.attention"]
    large = place > 7
    module = "kernels_pallas.large" if large else "kernels_pallas.softmax" if place > 4 else above.pop(0)
    kind = KINDS["float32"]
    case = with_trees(kind, 5) if fault in TREES else make(kind, 5, BLOCKS.queries[-1], EDGE if place > 10 else LONG)
    with planted(module, *FAULTS[fault], *above) as broken:
        assert caught(case, broken, CUTS if large else ONE)


def caught(case: Case, broken: ModuleType, blocks: Blocks) -> bool:
    tree = case.tree if any(row.parents for row in case.rows) else ()
    try:
        return worst(case, call(broken, case.kind, *given(case), *tree, blocks=blocks)) > limit(case.kind)
    except (IndexError, jax.errors.JaxRuntimeError) as error:  # a page that isn't there
        return "out of bounds" in str(error) or "Out-of-bounds" in str(error)


def pages(draw: np.random.Generator, size: int) -> tuple[list[tuple[int, int, int, int]], int]:
    """Pages that a step writes (page, token in its first place, places [first, last)) and its tokens."""
    names, items, token = draw.permutation(40), [], 0
    for length in draw.choice([0, 1, 1, 1, 2, 9, size, 2 * size + 3], 8):
        before = int(draw.integers(0, 3 * size))
        if token + length > 80:
            break
        for at in range(before // size * size, before + length if length else 0, size):
            first, last = max(before - at, 0), min(before + length - at, size)
            items.append((int(names[len(items)]), token + at - before, first, last))
        token += length
    items.insert(len(items) // 2, (-1, 0, 0, size))
    return items, token


def write(module: ModuleType, dtype: str, seed: int) -> tuple[Any, np.ndarray[Any, Any]]:
    """What the kernel makes of a random cache, and what it should be."""
    draw = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    size = 32 if kind.itemsize == 1 else PAGE
    wide = 100 if dtype == "int8" else 1  # of all its numbers, not 0 and 1 alone
    held, lines = (
        (wide * draw.uniform(-1, 1, s)).astype(np.float32).astype(kind) for s in ((90, size, 384), (80, 384))
    )
    right = held.copy()
    items, _ = pages(draw, size)
    for page, token, first, last in items:
        if page >= 0:
            right[45 + page, first:last] = lines[token + first : token + last]
    listed = np.full((48, 4), 10**6, np.int32)
    listed[: len(items)] = items
    spots = module.Spots(*listed.T, np.int32(len(items)))
    got = write_program(module, dtype)(jnp.asarray(lines), jnp.asarray(held), spots, np.int32(45))
    return got, right.astype(np.float32)


@cache
def write_program(module: ModuleType, dtype: str) -> Any:
    return jax.jit(partial(module.write, interpret=INTERPRET))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_lines_are_written_where_they_belong_and_nowhere_else(dtype: str, seed: int) -> None:
    got, right = write(kv_write, dtype, seed)
    assert not races()
    assert np.array_equal(np.asarray(got.astype(jnp.float32)), right)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_lines_are_written_more_often(seed: int) -> None:
    test_lines_are_written_where_they_belong_and_nowhere_else(("float32", "bfloat16")[seed % 2], seed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("_read(page, unit, r, i, start=False)", "pass"),
        ("_write(r, then - RING, start=False)", "pass"),
        ("(lines - shift)", "(lines - shift + 1)"),
        ("r.cache.at[r.page[i] + r.at[0]], r.done.at[2, k]", "r.cache.at[r.page[i] + r.at[0] + 1], r.done.at[2, k]"),
    ],
    ids=["pages are not waited for", "a buffer is reused too soon", "lines off by one", "page off by one"],
)
def test_a_planted_fault_in_writing_is_caught(old: str, new: str) -> None:
    from tests.kernels.cases import planted

    with planted("kernels_pallas.kv_write", old, new) as broken:
        for seed in range(4):
            got, right = write(broken, "float32", seed)
            if races() or not np.array_equal(np.asarray(got), right):
                return
    raise AssertionError("nobody noticed")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": "int4"}, "int4"),
        ({"dtype": "int8"}, "pages of 16 tokens are no multiple of 32"),
        ({"head": 96}, "head 96"),
        ({"page": 8}, "pages of 8"),
        ({"kv_heads": 5}, "5 kv heads"),
        ({"rows": 256, "entries": 8192}, "SMEM"),
        ({"tree": 65}, "trees of 65 tokens are not built, the most is 64"),
        ({"tree": 64, "tokens": 1 << 16}, "trees of 65536 tokens"),
        ({"kv_heads": 32, "head": 512}, "VMEM"),
    ],
)
def test_what_is_not_built_is_refused_by_name(change: dict[str, Any], why: str) -> None:
    good = FITS | {"dtype": "bfloat16", "on": SMALL}
    assert ours.supports(**good | {"on": Chip(name="v5e", vmem=128 << 20, smem=1 << 20)}) == ""
    assert why in ours.supports(**good | change)


def test_a_table_too_large_for_smem_raises() -> None:
    q, lines = jnp.zeros((8, 8, 128)), jnp.zeros((4, PAGE, 2 * 128))
    none = jnp.zeros(8, jnp.int32)
    tiles = ours.Tiles(none, none, none, none, 0)
    with pytest.raises(ValueError, match=r"page tables of 1000 rows x 1000 pages take .* SMEM"):
        ours.attention(q, lines, tiles, jnp.zeros((1000, 1000), jnp.int32), none, 0, kv_heads=1, scale=1.0)


def test_sizes_of_cases() -> None:
    """Cases hold what the names of the tests say."""
    rows = [row for seed in range(4) for row in make(KINDS["grouped"], seed, 8).rows]
    assert any(r.length == 0 for r in rows)
    assert any(r.length == 1 for r in rows)
    assert any(r.length > 1 and r.before > PAGE for r in rows)
    assert any((r.length + r.before) % PAGE == 0 and r.length for r in rows)
    assert max(r.length + r.before for r in rows) <= ENTRIES * PAGE
    assert sum(r.length for r in rows[:ROWS]) <= TOKENS
