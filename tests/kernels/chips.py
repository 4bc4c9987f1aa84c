"""Kernels compiled for chips that aren't here, in a process of its own: the variables must be set before jax starts.

python -m tests.kernels.chips CHIP... NAME...: of the cases that are named (CASES), what each takes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.quantised_matmul import quantised_matmul

ROOT = Path(__file__).parents[2]
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
"""Chip -> a topology of it; one device is used."""
F32, BF16, INT8, FP8, INT32 = jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn, jnp.int32
Case = tuple[Callable[..., Any], list[tuple[tuple[int, ...], Any]]]


def grouped(rows: int, experts: int, inner: int, columns: int, kind: Any = BF16) -> Case:
    """A call of grouped_matmul that reads one layer of two."""

    def run(x: Any, w: Any, sizes: Any, layer: Any) -> Any:
        return grouped_matmul(x, w, sizes, layer=layer)

    return run, [((rows, inner), kind), ((2, experts, columns, inner), kind), ((experts,), INT32), ((), INT32)]


def grouped_narrow(rows: int, experts: int, inner: int, columns: int, by: str, narrow: Any) -> Case:
    lines = (experts, 1, columns) if by == "row" else (experts, -(-columns // 128), -(-inner // 128))
    return partial(lambda by, x, w, z, s: grouped_matmul(x, w, z, s, by), by), [
        ((rows, inner), BF16),
        ((experts, columns, inner), narrow),
        ((experts,), INT32),
        (lines, F32),
    ]


def quantised(rows: int, inner: int, columns: int, by: str, narrow: Any, kind: Any = BF16) -> Case:
    lines = (2, 1, columns) if by == "row" else (2, -(-columns // 128), -(-inner // 128))
    return partial(lambda by, x, w, s, layer: quantised_matmul(x, w, s, by, layer), by), [
        ((rows, inner), kind),
        ((2, columns, inner), narrow),
        (lines, F32),
        ((), INT32),
    ]


SMALL: dict[str, Case] = {
    "grouped": grouped(40, 5, 256, 304),
    "grouped float32": grouped(40, 5, 256, 384, F32),
    "grouped, nothing whole": grouped(40, 5, 200, 300),
    "grouped int8": grouped_narrow(8, 5, 256, 384, "row", INT8),
    "quantised int8": quantised(1, 256, 320, "row", INT8),
    "quantised float32": quantised(8, 256, 384, "row", INT8, F32),
    "quantised fp8": quantised(9, 256, 320, "block", FP8),
}
LARGE: dict[str, Case] = {
    "experts decode up": grouped(512, 128, 2048, 768),
    "experts decode down": grouped(512, 128, 768, 2048),
    "experts prefill up": grouped(16384, 128, 2048, 768),
    "experts prefill down": grouped(16384, 128, 768, 2048),
    "experts prefill fp8": grouped_narrow(16384, 128, 2048, 768, "block", FP8),
    "8B up decode int8": quantised(64, 4096, 14336, "row", INT8),
    "8B down decode int8": quantised(64, 14336, 4096, "row", INT8),
    "8B up prefill int8": quantised(2048, 4096, 14336, "row", INT8),
    "8B down prefill int8": quantised(2048, 14336, 4096, "row", INT8),
    "8B up decode fp8": quantised(64, 4096, 14336, "block", FP8),
    "8B up prefill fp8": quantised(2048, 4096, 14336, "block", FP8),
    "8B up decode float32": quantised(64, 4096, 14336, "row", INT8, F32),
}


def compile_for(chip: str, case: Case, folder: Path) -> dict[str, int]:
    """Bytes of temporaries of a call, how many kernels are in it, and the registers that they spill. folder: where the
    compiler writes its schedules."""
    function, shapes = case
    for old in folder.iterdir():
        old.unlink()
    mesh = Mesh(np.array(topologies.get_topology_desc(CHIPS[chip], "tpu").devices[:1]), ("tp",))
    with jax.set_mesh(mesh):
        whole = NamedSharding(mesh, PartitionSpec())
        given = [jax.ShapeDtypeStruct(shape, kind, sharding=whole) for shape, kind in shapes]
        compiled = jax.jit(function).lower(*given).compile()
    texts = [file.read_text() for file in folder.glob("*_matmul*[0-9]-final_bundles.txt")]
    return {
        "temp": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": compiled.as_text().count("tpu_custom_call"),
        "bundles": sum(text.count("{") for text in texts),
        "spills": sum(len(re.findall(r"vst[^;\n]*_spill", text)) for text in texts),
    }


def run(which: str) -> dict[str, dict[str, dict[str, int]]]:
    """chip -> case -> what it takes. which: "small" or "large"."""
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu's lock is for real chips
    }
    with tempfile.TemporaryDirectory() as folder:
        settings["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        done = subprocess.run(
            [sys.executable, "-m", "tests.kernels.chips", which, folder],
            cwd=ROOT,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=550 if which == "small" else 1100,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    cases = SMALL if sys.argv[1] == "small" else LARGE
    into = Path(sys.argv[2])
    print(json.dumps({chip: {name: compile_for(chip, case, into) for name, case in cases.items()} for chip in CHIPS}))
