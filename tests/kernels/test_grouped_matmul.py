"""Rows by the matrix of their group: interpreted, with races looked for, against float64; and compiled for TPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu
from numpy.typing import NDArray

import kernels_pallas.grouped_matmul as kernel
from kernels_pallas.chip import INTERPRETED, Chip
from kernels_pallas.grouped_matmul import Blocks, choose, grouped_matmul, supports, visits
from kernels_pallas.product import Turn
from tests.kernels import chips

WATCHED = pltpu.InterpretParams(detect_races=True)
BF16 = np.dtype(ml_dtypes.bfloat16)
Draw = np.random.Generator
SMALL = Blocks(rows=16, columns=256, turn=Turn(columns=128, depth=128, across=128, part=128, kept=16))
"""Two turns across, and as many down as the summed dimension has."""


@pytest.fixture
def draw() -> Draw:
    """New cases at each run; the seed is printed where a test fails."""
    seed = int(np.random.SeedSequence().entropy) % 2**32
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def sizes_of(draw: Draw, groups: int, rows: int) -> NDArray[np.int32]:
    """Rows of each group: few or many, and most often some without any."""
    share = draw.dirichlet(np.full(groups, draw.choice([0.2, 1.0, 10.0])))
    return draw.multinomial(rows, share).astype(np.int32)


def expected(x: NDArray[Any], w: NDArray[Any], sizes: NDArray[np.int32]) -> NDArray[np.float64]:
    """Each row by its matrix, in float64."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return np.stack([w[e].astype(np.float64) @ row.astype(np.float64) for e, row in zip(group, x, strict=True)])


def check(found: Any, right: NDArray[np.float64], dtype: Any) -> None:
    """As near as sums in float32, and one rounding to the dtype, come."""
    rounding = 2**-8 if dtype == BF16 else 2e-6
    worst = np.abs(np.asarray(found).astype(np.float64) - right).max()
    assert worst <= rounding * np.abs(right).max(), worst
    assert not interpreter.races.races_found


def sweep(draw: Draw, shape: tuple[int, int, int, int], dtype: Any, blocks: Blocks, count: int) -> None:
    """`count` cases of one shape: the sizes of groups are data, so that nothing compiles again."""
    rows, groups, inner, columns = shape
    run = jax.jit(lambda x, w, sizes: grouped_matmul(x, w, sizes, blocks=blocks, interpret=WATCHED))
    for _ in range(count):
        x, w = draw.standard_normal((rows, inner)).astype(dtype), draw.standard_normal((groups, columns, inner))
        w, sizes = w.astype(dtype), sizes_of(draw, groups, rows)
        check(run(x, w, sizes), expected(x, w, sizes), dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "count"),
    [((37, 6, 72, 200), np.dtype(np.float32), 8), ((50, 9, 130, 140), BF16, 8), ((1, 4, 16, 24), BF16, 4)],
    ids=str,
)
def test_each_row_by_its_group(draw: Draw, shape: tuple[int, int, int, int], dtype: Any, count: int) -> None:
    sweep(draw, shape, dtype, SMALL, count)


@pytest.mark.slow
def test_many_shapes(draw: Draw) -> None:
    for _ in range(20):
        shape = tuple(int(n) for n in draw.integers((1, 1, 1, 1), (150, 20, 300, 400)))
        part, depth = (int(n) for n in draw.choice([128, 256], 2))
        turn = Turn(columns=256, depth=256, across=part, part=depth, kept=int(draw.choice([16, 32, 64])))
        wide = int(draw.choice([128, 256]))
        blocks = Blocks(rows=int(draw.choice([16, 32, 64])), columns=wide, turn=turn.fit(wide, shape[2]))
        sweep(draw, shape, draw.choice([np.dtype(np.float32), BF16]), blocks, 5)


@pytest.mark.parametrize("by", ["row", "block"])
def test_quantised_matrices_of_one_layer(draw: Draw, by: str) -> None:
    """int8 by rows, fp8 by blocks, and a stack of which one layer is meant."""
    rows, groups, inner, columns = 33, 5, 150, 260
    shape = (2, groups, columns, inner)
    w = (draw.standard_normal(shape) * 40).astype(np.int8 if by == "row" else ml_dtypes.float8_e4m3fn)
    lines = (1, columns) if by == "row" else (3, 2)
    scale = draw.random((2, groups, *lines)).astype(np.float32)
    each = scale.swapaxes(2, 3) if by == "row" else scale.repeat(128, 2)[:, :, :columns].repeat(128, 3)[..., :inner]
    run = jax.jit(lambda x, w, z, s, layer: grouped_matmul(x, w, z, s, by, layer, interpret=WATCHED))
    for layer in (0, 1):
        x, sizes = draw.standard_normal((rows, inner)).astype(np.float32), sizes_of(draw, groups, rows)
        found = run(x, w, sizes, scale, jnp.int32(layer))
        check(found, expected(x, w[layer].astype(np.float64) * each[layer], sizes), np.float32)


def test_every_block_meets_its_groups(draw: Draw) -> None:
    """The plan against a search by hand."""
    for rows, groups, tile in ((1, 1, 16), (60, 11, 16), (33, 5, 7)):
        run = jax.jit(lambda sizes, rows=rows, tile=tile: visits(sizes, rows, tile))
        for _ in range(20):
            sizes = sizes_of(draw, groups, rows)
            owner = np.repeat(np.arange(groups), sizes)
            met = [(t, int(e)) for t in range(-(-rows // tile)) for e in np.unique(owner[t * tile : (t + 1) * tile])]
            plan = run(sizes)
            assert int(plan.count) == len(met) <= len(plan.group)
            assert list(zip(plan.tile.tolist(), plan.group.tolist(), strict=True))[: len(met)] == met
            assert plan.starts.tolist() == [0, *np.cumsum(sizes)]


FAULTS: dict[str, Callable[[Any], Any]] = {
    "group off by one": lambda plan: plan._replace(group=(plan.group + 1) % (len(plan.starts) - 1)),
    "first row off by one": lambda plan: plan._replace(starts=plan.starts + 1),
    "a visit is missing": lambda plan: plan._replace(count=plan.count - 1),
    "block off by one": lambda plan: plan._replace(tile=jnp.maximum(plan.tile - 1, 0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(draw: Draw, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(kernel, "visits", lambda *given: FAULTS[fault](visits(*given)))
    with pytest.raises(AssertionError):
        sweep(draw, (40, 4, 16, 24), np.dtype(np.float32), SMALL, 1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((8, 2, 64, 64, jnp.int32, jnp.int32), "rows of int32"),
        ((8, 2, 64, 64, jnp.float32, jnp.bfloat16), "matrices of bfloat16 for rows of float32"),
        ((8, 2, 64, 64, jnp.bfloat16, jnp.int8), "matrices of int8 without scales"),
        ((8, 2, 64, 1 << 21, jnp.bfloat16, jnp.bfloat16), "bytes of VMEM"),
        ((8, 1 << 17, 64, 64, jnp.bfloat16, jnp.bfloat16), "numbers in SMEM"),
    ],
)
def test_what_is_not_supported_is_said(given: Any, says: str) -> None:
    assert says in supports(INTERPRETED, *given)
    assert supports(INTERPRETED, 8, 2, 64, 64, jnp.bfloat16, jnp.bfloat16) == ""


def test_blocks_fit_every_chip() -> None:
    for name, vmem in (("v5e", 128), ("v5p", 64), ("v6e", 128), ("7x", 64)):
        on = Chip(name=name, vmem=vmem << 20, smem=1 << 20)
        for rows in (1, 512, 16384):
            for columns, inner in ((768, 2048), (2048, 768), (14336, 4096), (4096, 14336), (2880, 2880)):
                blocks = choose(on, rows, 32, columns, inner, jnp.bfloat16, jnp.bfloat16)
                assert supports(on, rows, 32, columns, inner, jnp.bfloat16, jnp.bfloat16, blocks=blocks) == ""


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, dict[str, int]]]:
    """Both kernels, small, on every chip."""
    return chips.run("small")


@pytest.mark.parametrize("chip", chips.CHIPS)
def test_both_kernels_compile(compiled: dict[str, dict[str, dict[str, int]]], chip: str) -> None:
    for name, size in compiled[chip].items():
        assert size["kernels"] == 1, name
        assert size["bundles"] > 100, (name, size)
        # float32 is multiplied in six passes, which the registers don't hold
        assert size["spills"] <= (64 if "float32" in name else 0), (name, size)
        if "nothing whole" not in name:  # XLA lays arrays whose lines are no multiple of 8 out otherwise, and copies
            assert size["temp"] < 1 << 20, (name, size)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_large_shapes_compile_and_copy_nothing() -> None:
    for chip, cases in chips.run("large").items():
        for name, size in cases.items():
            assert size["temp"] < 1 << 20, (chip, name, size)
            assert size["spills"] == 0 or name.endswith("float32"), (chip, name, size)
