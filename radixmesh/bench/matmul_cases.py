"""The matrix kernels in `radixmesh bench kernels`, each beside what jax has for the same product.

Qwen3-30B-A3B's experts for 64 and 2,048 tokens, and matrices of Llama 3.1 8B. Every expert has rows and no two blocks
fall together, which is the dearest; the roofline reads each matrix and each row once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

from kernels_pallas import grouped_matmul as grouped
from kernels_pallas import quantised_matmul as quantised
from kernels_pallas.chip import chip
from kernels_pallas.product import By, Turn
from radixmesh.bench.kernels import Case, Shape

BF16, INT8, FP8, F32, I32 = jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn, jnp.float32, jnp.int32
EXPERTS, TOP, HIDDEN, EXPERT, FFN = 128, 8, 2048, 768, 14336
TILE = 128
"""Rows of a block of megablox."""


def cases() -> list[Case]:
    """Of the chip in use."""
    out: list[Case] = []
    for tokens in (64, 2048):
        for inner, columns in ((HIDDEN, EXPERT), (EXPERT, HIDDEN)):
            out += _experts(tokens, inner, columns, BF16, "row") + _experts(tokens, inner, columns, FP8, "block")
        out += _experts(tokens, HIDDEN, EXPERT, INT8, "row")
        out += _narrow(tokens, 4096, FFN, INT8, "row") + _narrow(tokens, FFN, 4096, INT8, "row")
        out += _narrow(tokens, 4096, FFN, FP8, "block")
    return out


def _lower(call: Callable[..., Any], shapes: list[tuple[tuple[int, ...], Any]]) -> Callable[[Shape], Any]:
    return lambda shape: jax.jit(call).lower(*(shape(dims, kind) for dims, kind in shapes))


def _nest(steps: int, across: int, columns: int, inner: int, turn: Turn, keeps: int) -> tuple[int, int, int, int]:
    """Turns: of the grid; inside of each, over columns and down the summed dimension; and of a loop that keeps rows.
    across: blocks of columns, which the cores of a chip share."""
    cores = min(pltpu.get_tpu_info().num_cores, across)
    return -(-steps // cores), columns // turn.columns, inner // turn.depth, keeps


def _experts(tokens: int, inner: int, columns: int, kind: Any, by: By) -> list[Case]:
    rows, name = tokens * TOP, f"{tokens} {inner}-{columns}"
    shapes = [((rows, inner), BF16), ((EXPERTS, columns, inner), kind), ((EXPERTS,), I32)]
    size = jnp.dtype(kind).itemsize
    work: dict[str, Any] = {
        "moved": 2 * rows * (inner + columns) + size * EXPERTS * columns * inner,
        "flops": 2 * rows * inner * columns,
    }
    if kind != BF16:
        shapes.append(((EXPERTS, *((1, columns) if by == "row" else (columns // 128, inner // 128))), F32))
    blocks = grouped.choose(chip(), rows, EXPERTS, columns, inner, BF16, kind, by)
    across = -(-columns // blocks.columns)
    keeps = -(-blocks.rows // blocks.turn.kept)
    steps = across * (-(-rows // blocks.rows) + EXPERTS - 1)

    def ours(x: Any, w: Any, sizes: Any, *scale: Any) -> Any:
        return grouped.grouped_matmul(x, w, sizes, *scale, by=by)

    def megablox(x: Any, w: Any, sizes: Any) -> Any:
        return gmm(x, w, sizes, preferred_element_type=BF16, tiling=(TILE, inner, wide), transpose_rhs=True)

    def ragged(x: Any, w: Any, sizes: Any, *scale: Any) -> Any:
        matrices = _widened(w, scale[0], by) if scale else w
        dims = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
        return jax.lax.ragged_dot_general(x, matrices, sizes, dims, preferred_element_type=F32).astype(BF16)

    nest = _nest(steps, across, blocks.columns, inner, blocks.turn, keeps)
    said = f"{jnp.dtype(kind).name.split('_')[0]} {name}"
    out = [Case(name=f"grouped {said}", lower=_lower(ours, shapes), nest=nest, **work)]
    if kind == BF16:
        wide = min(columns, 1024)
        many = -(-columns // wide)
        theirs = (-(-many * (-(-rows // TILE) + EXPERTS - 1) // min(pltpu.get_tpu_info().num_cores, many)), 1, 1, 1)
        out.append(Case(name=f"megablox {name}", lower=_lower(megablox, shapes), nest=theirs, **work))
    return [*out, Case(name=f"ragged_dot {said}", lower=_lower(ragged, shapes))]


def _widened(w: Any, scale: Any, by: By) -> Any:
    """bfloat16, as XLA's own products take it."""
    if by == "row":
        return (w.astype(F32) * jnp.swapaxes(scale, -1, -2)).astype(BF16)
    return (w.astype(F32) * jnp.repeat(jnp.repeat(scale, 128, -2), 128, -1)).astype(BF16)


def _narrow(tokens: int, inner: int, columns: int, kind: Any, by: By) -> list[Case]:
    lines = (1, columns) if by == "row" else (columns // 128, inner // 128)
    shapes = [((tokens, inner), BF16), ((columns, inner), kind), (lines, F32)]
    blocks = quantised.choose(chip(), tokens, columns, inner, BF16, kind, by)
    across = -(-columns // blocks.columns)
    steps = across * -(-tokens // blocks.rows)

    def xla(x: Any, w: Any, scale: Any) -> Any:
        y = jax.lax.dot_general(x, _widened(w, scale, by), (((1,), (1,)), ((), ())), preferred_element_type=F32)
        return y.astype(BF16)

    said = f"{jnp.dtype(kind).name.split('_')[0]} {tokens} {inner}-{columns}"
    return [
        Case(
            name=f"quantised {said}",
            lower=_lower(lambda x, w, s: quantised.quantised_matmul(x, w, s, by), shapes),
            nest=_nest(steps, across, blocks.columns, inner, blocks.turn, 1),
            moved=2 * tokens * (inner + columns) + columns * inner,
            flops=2 * tokens * inner * columns,
        ),
        Case(name=f"xla dot {said}", lower=_lower(xla, shapes)),
    ]
