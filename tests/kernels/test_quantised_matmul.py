"""Rows times a quantised matrix: interpreted, with races looked for, against float64."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.chip import INTERPRETED, Chip
from kernels_pallas.product import Turn
from kernels_pallas.quantised_matmul import Blocks, choose, quantised_matmul, supports
from tests.kernels.cases import planted

WATCHED = pltpu.InterpretParams(detect_races=True)
BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
F32, INT8 = np.dtype(np.float32), np.dtype(np.int8)
Draw = np.random.Generator
TURN = Turn(columns=128, depth=128, across=128, part=128)


@pytest.fixture
def draw() -> Draw:
    """New cases at each run; the seed is printed where a test fails."""
    seed = int(np.random.SeedSequence().entropy) % 2**32
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def sweep(
    draw: Draw, shape: tuple[int, int, int], by: str, narrow: Any, dtype: Any, count: int, blocks: Blocks | None = None
) -> None:
    """`count` cases of one shape, of a stack of two layers."""
    rows, inner, columns = shape
    run = jax.jit(lambda x, w, s, layer: quantised_matmul(x, w, s, by, layer, blocks, WATCHED))
    for i in range(count):
        x = draw.standard_normal((rows, inner)).astype(dtype)
        w = (draw.standard_normal((2, columns, inner)) * 40).astype(narrow)
        lines = (1, columns) if by == "row" else (-(-columns // 128), -(-inner // 128))
        scale = draw.random((2, *lines)).astype(np.float32)
        each = scale.swapaxes(1, 2) if by == "row" else scale.repeat(128, 1)[:, :columns].repeat(128, 2)[..., :inner]
        right = x.astype(np.float64) @ (w.astype(np.float64) * each)[i % 2].T
        found = np.asarray(run(x, w, scale, jnp.int32(i % 2))).astype(np.float64)
        worst = np.abs(found - right).max()
        assert worst <= (2**-8 if dtype == BF16 else 2e-6) * np.abs(right).max(), worst
        assert not interpreter.races.races_found


@pytest.mark.parametrize(
    ("shape", "by", "narrow", "dtype", "count"),
    [
        ((1, 72, 200), "row", INT8, BF16, 5),
        ((70, 130, 260), "row", INT8, F32, 5),
        ((9, 300, 140), "block", FP8, F32, 5),
        ((40, 256, 130), "block", INT8, BF16, 5),
    ],
    ids=str,
)
def test_equals_the_product_with_what_it_stands_for(
    draw: Draw, shape: tuple[int, int, int], by: str, narrow: Any, dtype: Any, count: int
) -> None:
    """One row, sizes that fill no block, several blocks of rows."""
    sweep(draw, shape, by, narrow, dtype, count)


@pytest.mark.slow
def test_many_shapes(draw: Draw) -> None:
    for _ in range(20):
        shape = tuple(int(n) for n in draw.integers((1, 1, 1), (150, 500, 500)))
        across, part = (int(n) for n in draw.choice([128, 256], 2))
        wide, turn = int(draw.choice([128, 256])), Turn(columns=256, depth=256, across=across, part=part)
        blocks = Blocks(rows=int(draw.choice([16, 32, 64])), columns=wide, turn=turn.fit(wide, shape[1]))
        by, narrow = str(draw.choice(["row", "block"])), [INT8, FP8][draw.integers(2)]
        sweep(draw, shape, by, narrow, [F32, BF16][draw.integers(2)], 3, blocks)


FAULTS = {
    "scale of the wrong block": ("jnp.minimum(first + row + r, last)", "jnp.minimum(first + row + r + 1, last)"),
    "scale of the turn before": ("into.start // SIDE, summed.start // SIDE", "into.start // SIDE, 0"),
    "the sum of the turn before is kept": ("total[...] = jnp.zeros(total.shape, jnp.float32)", "pass"),
    "a turn is left out": ("repeat(whole, lambda k, _:", "repeat(whole - 1, lambda k, _:"),
    "the same turn again": ("summed = pl.ds(at(k, turn.depth, a)", "summed = pl.ds(at(0, turn.depth, a)"),
    "a part off by one": ("into = pl.ds(at(j, turn.columns, b)", "into = pl.ds(at(j, turn.columns, 0)"),
    "a turn goes to another's place": ("keep(pl.ds(at(j, turn.columns, 0)", "keep(pl.ds(at(0, turn.columns, 0)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(draw: Draw, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with planted("kernels_pallas.product", *FAULTS[fault], "kernels_pallas.quantised_matmul") as broken:
        monkeypatch.setattr(sys.modules[__name__], "quantised_matmul", broken.quantised_matmul)
        turn = broken.Turn(columns=256, depth=128, across=128, part=128)
        with pytest.raises(AssertionError):
            sweep(draw, (8, 384, 500), "block", FP8, F32, 2, broken.Blocks(rows=16, columns=512, turn=turn))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((8, 64, 64, jnp.float16, jnp.int8), "rows of float16"),
        ((8, 64, 64, jnp.bfloat16, jnp.uint8), "matrices of uint8"),
        ((8, 64, 64, jnp.bfloat16, jnp.bfloat16), "matrices of bfloat16 with scales"),
        ((8, 64, 1 << 21, jnp.bfloat16, jnp.int8), "bytes of VMEM"),
        ((8, 1 << 17, 4096, jnp.bfloat16, jnp.float8_e4m3fn), "bytes of SMEM"),
        ((8, 64, 64, jnp.bfloat16, jnp.int8, Blocks(rows=8, columns=96, turn=TURN)), "a multiple of 128 and of a turn"),
    ],
)
def test_what_is_not_supported_is_said(given: Any, says: str) -> None:
    assert says in supports(INTERPRETED, *given)
    assert supports(INTERPRETED, 8, 64, 64, jnp.bfloat16, jnp.int8) == ""


def test_blocks_fit_every_chip() -> None:
    for name, vmem in (("v5e", 128), ("v5p", 64), ("v6e", 128), ("7x", 64)):
        on = Chip(name=name, vmem=vmem << 20, smem=1 << 20)
        for rows in (1, 64, 2048):
            for columns, inner in ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672), (100, 72)):
                for x in (jnp.bfloat16, jnp.float32):
                    blocks = choose(on, rows, columns, inner, x, jnp.int8)
                    assert supports(on, rows, columns, inner, x, jnp.int8, blocks) == ""
