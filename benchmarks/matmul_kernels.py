"""What the matrix kernels cost on chips that aren't here, beside their rooflines and what jax has for the same.

python -m benchmarks.matmul_kernels CHIP...: compiles for each (v5e, v5p, v6e, 7x) and prints a line a case: seconds of
compile, spills of vector registers, temporaries, and microseconds. Those of a kernel are the larger of what its
instructions take, as the compiler scheduled them (bundles of the loop over the grid, times its steps), and what its
bytes take at the chip's bandwidth; those of XLA's own operations are not comparable, so that only their temporaries
are printed. The roofline is the larger of operations at the chip's rate and bytes at its bandwidth, once each.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD = tempfile.TemporaryDirectory()
DUMP = Path(HELD.name)
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true",
}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from kernels_pallas import grouped_matmul as grouped  # noqa: E402
from kernels_pallas import quantised_matmul as quantised  # noqa: E402
from kernels_pallas.chip import chip  # noqa: E402

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
CLOCK = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "7x": 2.2e9}
"""Cycles a second, from the rate of the matrix units and their size."""
BF16, INT8, FP8, F32, INT32 = jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn, jnp.float32, jnp.int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """kernel: its name in the program, "" of XLA's own. steps: of its grid, read: bytes that they read and write."""

    name: str
    kernel: str
    run: Callable[..., Any]
    shapes: list[tuple[tuple[int, ...], Any]]
    steps: int
    read: int
    operations: int
    least: int


def experts(rows: int, count: int, inner: int, columns: int) -> list[Case]:
    """Ours, megablox and XLA's for the same product; every expert has rows, no two blocks fall together."""
    shapes = [((rows, inner), BF16), ((count, columns, inner), BF16), ((count,), INT32)]
    blocks = grouped.choose(chip(), rows, count, columns, inner, BF16, BF16)
    wide = min(columns, 1024 if columns > 1024 else columns)
    least = 2 * (rows * (inner + columns) + count * columns * inner)

    def visits(tile: int) -> int:
        return -(-rows // tile) + count - 1

    def megablox(x: Any, w: Any, sizes: Any) -> Any:
        return gmm(x, w, sizes, preferred_element_type=BF16, tiling=(128, inner, wide), transpose_rhs=True)

    def ragged(x: Any, w: Any, sizes: Any) -> Any:
        dims = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
        return jax.lax.ragged_dot_general(x, w, sizes, dims, preferred_element_type=F32).astype(BF16)

    common = {"shapes": shapes, "operations": 2 * rows * inner * columns, "least": least}
    name = f"{count} experts, {rows} rows, {inner} -> {columns}"

    def cost(tile: int, across: int) -> dict[str, int]:
        outer = -(-columns // across)
        return {
            "steps": outer * visits(tile),
            "read": 2 * (outer * rows * inner + count * columns * inner + rows * columns),
        }

    return [
        Case(
            name=f"{name}: ours {blocks.rows} x {blocks.columns}",
            kernel="grouped_matmul",
            run=grouped.grouped_matmul,
            **cost(blocks.rows, blocks.columns),
            **common,
        ),
        Case(name=f"{name}: megablox 128 x {wide}", kernel="gmm", run=megablox, **cost(128, wide), **common),
        Case(name=f"{name}: ragged_dot", kernel="", run=ragged, steps=0, read=0, **common),
    ]


def narrow(rows: int, inner: int, columns: int, by: Any, kind: Any) -> list[Case]:
    lines = (1, columns) if by == "row" else (-(-columns // 128), -(-inner // 128))
    blocks = quantised.choose(chip(), rows, columns, inner, BF16, kind)
    outer, tiles = -(-columns // blocks.columns), -(-rows // blocks.rows)
    again = outer if tiles > 1 else 1
    return [
        Case(
            name=f"{jnp.dtype(kind).name}, {rows} rows, {inner} -> {columns}: {blocks.rows} x {blocks.columns}",
            kernel="quantised_matmul",
            run=lambda x, w, s: quantised.quantised_matmul(x, w, s, by),
            shapes=[((rows, inner), BF16), ((columns, inner), kind), (lines, F32)],
            steps=outer * tiles,
            read=2 * rows * (inner * again + columns) + columns * inner,
            operations=2 * rows * inner * columns,
            least=2 * rows * (inner + columns) + columns * inner,
        )
    ]


def cases() -> list[Case]:
    """Of the chip in use: Qwen3-30B-A3B, and matrices of Llama 3.1 8B."""
    out: list[Case] = []
    for tokens in (64, 2048):
        for inner, columns in ((2048, 768), (768, 2048)):
            out += experts(tokens * 8, 128, inner, columns)
    for tokens in (64, 2048):
        out += narrow(tokens, 4096, 14336, "row", INT8) + narrow(tokens, 14336, 4096, "row", INT8)
        out += narrow(tokens, 4096, 14336, "block", FP8)
    return out


def bundles(kernel: str) -> tuple[int, int]:
    """Bundles in the loops of a kernel that was just compiled, and its spills of vector registers."""
    file = max(DUMP.glob(f"*-{kernel}*-final_bundles.txt"), key=lambda f: ("schedule" not in f.name, f.stat().st_mtime))
    text = file.read_text()
    return len(re.findall(r"^\s*0x[0-9a-f]+\s+(?:\w\w)?:?\s*>", text, re.M)), len(re.findall(r"vst \[.*_spill", text))


def main(name: str) -> None:
    """Print the table of a chip."""
    mesh = Mesh(np.array(topologies.get_topology_desc(TOPOLOGIES[name], "tpu").devices[:1]), ("tp",))
    with jax.set_mesh(mesh):
        info, whole = pltpu.get_tpu_info(), NamedSharding(mesh, PartitionSpec())
        rate, width = info.bf16_ops_per_second * info.num_cores, info.mem_bw_bytes_per_second * info.num_cores
        for case in cases():
            for file in DUMP.iterdir():
                file.unlink()
            given = [jax.ShapeDtypeStruct(shape, kind, sharding=whole) for shape, kind in case.shapes]
            start = time.perf_counter()
            compiled = jax.jit(case.run).lower(*given).compile()
            seconds = time.perf_counter() - start
            temp = compiled.memory_analysis().temp_size_in_bytes
            least = max(case.operations / rate, case.least / width) * 1e6
            said = f"{name:4} {case.name:62} compile {seconds:5.1f} s  temp {temp / 2**20:6.1f} MiB"
            if case.kernel:
                body, spills = bundles(case.kernel)
                work, moved = case.steps * body / info.num_cores / CLOCK[name] * 1e6, case.read / width * 1e6
                said += f"  spills {spills:4}  instructions {work:6.0f} us  bytes {moved:6.0f} us"
                said += f"  estimate {max(work, moved):6.0f} us"
            print(f"{said}  roofline {least:6.0f} us", flush=True)


if __name__ == "__main__":
    for each in sys.argv[1:] or TOPOLOGIES:
        main(each)
