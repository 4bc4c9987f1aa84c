"""The kernels compile for every chip, with no TPU here, and copy no cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from radixmesh.bench.kernels import TOPOLOGY, loops, pipeline

ROOT = Path(__file__).parents[2]
SHAPES = {
    "decode": (16, 32, 8, 128, "bfloat16", None),
    "64 and window": (64, 8, 2, 64, "bfloat16", 128),
    "float32": (8, 4, 2, 128, "float32", None),
    "one of eight devices": (16, 4, 1, 128, "bfloat16", None),
    "int8": (8, 8, 2, 64, "int8", None),
    "fp8": (8, 8, 2, 128, "float8_e4m3fn", None),
    "tree, window, int8": (16, 8, 2, 64, "int8", 40),
}
"""Tokens, q heads, kv heads, head, dtype of the cache, window."""
LATER = ["one of eight devices"]
"""Shapes that the golden records compile too, as a part of the 8B step."""


def compile_all(chip: str, names: list[str]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from kernels_pallas import attention, kv_write

    mesh = Mesh(np.array(topologies.get_topology_desc(TOPOLOGY[chip], "tpu").devices[:1]), ("x",))
    out: dict[str, Any] = {}
    for name in names:
        tokens, q_heads, kv_heads, head, dtype, window = SHAPES[name]

        def of(*dims: int, kind: Any = jnp.int32) -> Any:
            return jax.ShapeDtypeStruct(dims, kind, sharding=NamedSharding(mesh, PartitionSpec()))

        attend = partial(attention.attention, kv_heads=kv_heads, scale=1.0, window=window)
        small = jnp.dtype(dtype).itemsize == 1

        def step(
            q: Any, lines: Any, cache: Any, tiles: Any, spots: Any, *rest: Any, attend: Any = attend, **more: Any
        ) -> Any:
            cache = kv_write.write(lines, cache, spots, rest[-1])
            return attend(q, cache, tiles, *rest, **more), cache

        line, many, one = kv_heads * 2 * head, of(tokens), of()
        asks = "bfloat16" if small else dtype
        with jax.set_mesh(mesh):
            compiled = (
                jax.jit(step, donate_argnums=2)
                .lower(
                    of(tokens, q_heads, head, kind=asks),
                    of(tokens, line, kind=asks),
                    of(256, 32, line, kind=dtype),
                    attention.Tiles(many, many, many, many, one),
                    kv_write.Spots(many, many, many, many, one),
                    of(16, 64),
                    of(16),
                    one,
                    scales=of(2, kv_heads, kind=jnp.float32) if small else None,
                    tree=attention.Tree(of(16), many, of(2, tokens)) if "tree" in name else None,
                )
                .compile()
            )
        memory = compiled.memory_analysis()
        out[name] = {
            "cache": 256 * 32 * line * jnp.dtype(dtype).itemsize,
            "alias": memory.alias_size_in_bytes,
            "temp": memory.temp_size_in_bytes,
        }
    return out


@pytest.mark.parametrize(
    "names",
    [[name for name in SHAPES if name not in LATER], pytest.param(LATER, marks=pytest.mark.slow)],
    ids=["", "later"],
)
@pytest.mark.parametrize("chip", TOPOLOGY)
def test_kernels_compile_and_copy_no_cache(chip: str, names: list[str]) -> None:
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu's lock is for real chips
    }
    command = [sys.executable, "-m", "tests.kernels.test_compile", chip, *names]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, size in json.loads(done.stdout.splitlines()[-1]).items():
        assert size["alias"] == size["cache"], f"{name}: the donation of the cache is lost: {size}"
        assert size["temp"] < size["cache"] // 4, f"{name}: {size}"


def test_loops_are_read_from_a_schedule() -> None:
    text = """
 0x1   :  { %a = sld }
 0x2 LB: > { %b = sld ;; %7 = dma.hbm_to_vmem }
 0x3   : > { %c = vst [vmem:[#allocation1_spill]] %v }
 0x4 LB: >> { %d = vmatmul.f32 %v }
 0x5   : > { %e = sadd }
 0x6   :  { %f = halt }
"""
    found = {loop.depth: loop for loop in loops(text)}
    assert (found[2].bundles, found[2].products) == (1, 1)
    assert (found[1].bundles, found[1].copies, found[1].spills) == (3, 1, 1)


def test_turns_with_a_mask_and_without_count_each_by_their_number() -> None:
    copies = " ;; ".join(f"%{n} = dma.hbm_to_vmem" for n in range(5))
    text = f"""
 0x1 LB: > {{ {copies} }}
 0x2 LB: > {{ %b = sld }}
 0x3 LB: >> {{ %c = sld }}
 0x4 LB: >>> {{ %d = vmatmul.f32 %v }}
 0x5 LB: >>> {{ %d = vmatmul.f32 %v ;; %c = vst [vmem:[#allocation1_spill]] %v }}
 0x6   : >>> {{ %e = sadd }}
 0x7   : >> {{ %e = sadd }}
 0x8   : > {{ %e = sadd }}
 0x9   :  {{ %f = halt }}
"""
    blocks, cuts = 10 * (1 + 1 + 1), (3 + 20) * 2
    assert pipeline(loops(text), 2, 10, (3, 20)) == (blocks + cuts + 2 * (3 * 2 + 20 * 1), 1)


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1], sys.argv[2:])))
