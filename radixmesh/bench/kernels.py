"""Pallas kernels compiled for TPUs that are only described: what the compiler says of each, and the same of peers.

A case is a function that lowers one call for a chip. The compiler's last schedule (bundles of instructions, one a
cycle) is read where it writes it: loops are told apart, so a turn of the loop that multiplies has a length in cycles.
Estimated cycles: the longer of all turns of that loop and of the roofline. What stands around that loop, stalls and
latencies are not in it, for ours and for peers alike.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
BYTES = {"v5e": 819e9, "v5p": 2765e9, "v6e": 1640e9, "7x": 3690e9}
"""Chip -> bytes a second between one device's HBM and the chip (published; half a chip is a device of 7x)."""
FLOPS = {"v5e": 197e12, "v5p": 459e12, "v6e": 918e12, "7x": 1153e12}
"""Chip -> bfloat16 operations a second of one device (published)."""
CLOCK = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "7x": 2.2e9}
"""Chip -> cycles a second. Derived: operations a second over those of a cycle; that of 7x is a guess."""
Shape: TypeAlias = Callable[..., Any]
"""(dimensions, dtype) -> a shape on the chip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """lower: from a way to make shapes to a lowered call. turns: of the loop that multiplies; 0 = cycles are not
    estimated. rank: of that loop among those that multiply, the shortest first; -1: the longest. depth: of nesting,
    where other loops do not count. kernel: of several, what the name of the one that works begins with. around: the
    loop around the one that multiplies starts the copies, once for each turn.

    cuts: where the loops that multiply run for each cut of a turn's keys, and have two forms: how many cuts have a
    mask, and how many have none. trips: their turns for a cut. What stands around them in a turn counts too.

    nest: for a kernel that is a grid instead: turns of the grid, and inside of each over columns and down the summed
    dimension; and of a loop that keeps rows of what was multiplied. What is 1 is no loop. All loops count then.

    moved, flops: bytes and operations that the work needs, whoever does it.
    """

    name: str
    lower: Callable[[Shape], Any]
    turns: int = 0
    rank: int = -1
    depth: int = 0
    trips: int = 0
    cuts: tuple[int, int] | None = None
    kernel: str = ""
    around: bool = False
    nest: tuple[int, ...] = ()
    moved: float = 0
    flops: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """depth: of nesting. Of a turn, inner loops left out: bundles: instructions; products: what they feed to matrix
    units; copies: that they start; spills: registers stored because there were too few."""

    depth: int
    bundles: int
    products: int
    copies: int
    spills: int


def loops(text: str) -> list[Loop]:
    """The loops of a final schedule as the compiler prints it."""
    out: list[Loop] = []
    stack = [[0, 0, 0, 0]]
    ended: dict[int, list[int]] = {}

    def close() -> None:
        ended[len(stack) - 1] = stack[-1]
        depth, (bundles, products, copies, spills) = len(stack) - 1, stack.pop()
        out.append(Loop(depth=depth, bundles=bundles, products=products, copies=copies, spills=spills))

    for line in text.splitlines():
        found = re.match(r"\s*0x[0-9a-f]+\s+([A-Z]{2})?:?\s*([>\s]*)\{(.*)", line)
        if found is None:
            continue
        label, depth, bundle = found[1], found[2].count(">"), found[3]
        while len(stack) - 1 > depth:
            close()
        if label == "LB" and depth and len(stack) - 1 == depth and stack[-1][0]:
            close()
        if label != "LB" and len(stack) == depth and depth in ended:
            # a bundle of a loop that holds work of the loop around it is printed as the latter's
            while out.pop().depth != depth:
                pass
            stack.append(ended[depth])
        while len(stack) - 1 < depth:
            stack.append([0, 0, 0, 0])
        for deeper in [k for k in ended if k > depth]:
            del ended[deeper]
        stack[-1][0] += 1
        stack[-1][1] += len(re.findall(r"= vmatmul|vmatpush|vmatprep", bundle))
        stack[-1][2] += len(re.findall(r"= dma\.(?:\w+_to|general)", bundle))
        stack[-1][3] += len(re.findall(r"vst[^;]*_spill", bundle))
    while stack:
        close()
    return out


def pipeline(found: list[Loop], trips: int, turns: int, cuts: tuple[int, int]) -> tuple[int, int]:
    """Cycles of all turns of a loop over blocks of keys, and registers spilled in what is counted.

    In it are what starts copies and, after that, a loop over cuts, in which are those that multiply, `trips` turns
    each: the longest has a mask, the shortest none. All else from there to the next product counts for a block, or a
    cut.
    """
    deepest = max(loop.depth for loop in found if loop.products)
    at = [n for n, loop in enumerate(found) if loop.depth == deepest and loop.products]
    begin = max(n for n, loop in enumerate(found[: at[0]]) if loop.copies > 4)
    end = next((n for n, loop in enumerate(found) if n > at[-1] and loop.products), len(found))
    forms = sorted((found[n] for n in at), key=lambda loop: loop.bundles)
    rest = [loop for loop in found[begin:end] if not loop.products and loop.depth >= deepest - 2]
    block, cut = (sum(loop.bundles for loop in rest if (loop.depth > deepest - 2) == deep) for deep in (False, True))
    masked, plain = cuts
    cycles = turns * block + (masked + plain) * cut + trips * (masked * forms[-1].bundles + plain * forms[0].bundles)
    return cycles, sum(loop.spills for loop in (*forms, *rest))


def measure(case: Case, chip: str, shape: Shape, folder: Path) -> dict[str, Any]:
    """Compile one case. folder: where the compiler writes its schedules."""
    for old in folder.iterdir():
        old.unlink()
    begin = time.perf_counter()
    row: dict[str, Any] = {"case": case.name, "chip": chip}
    try:
        lowered = case.lower(shape)
        compiled = lowered.compile()
    except Exception as error:  # noqa: BLE001 whatever a compiler or a peer says is the figure
        return row | {"error": " ".join(str(error).split())[:300]}
    row["compile_s"] = round(time.perf_counter() - begin, 2)
    used = r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"'
    row["vmem"] = max(map(int, re.findall(used, compiled.as_text())), default=0)
    row["temp"] = compiled.memory_analysis().temp_size_in_bytes
    dump = f"*{case.kernel}*[0-9]-final_bundles.txt" if case.kernel else "*[0-9]-final_bundles.txt"
    text = max(folder.glob(dump), key=lambda f: f.stat().st_size).read_text()
    found = [loop for loop in loops(text) if loop.depth]
    row["bundles"] = sum(1 for line in text.splitlines() if re.match(r"\s*0x", line))
    row["spills"] = len(re.findall(r"vst[^;\n]*_spill", text))
    if case.nest and any(loop.depth == 1 for loop in found):  # one turn alone is no loop, and has no estimate
        return row | bounded(case, chip, scheduled(found, case.nest))
    if case.cuts:
        row["cuts"] = dict(zip(("masked", "plain"), case.cuts, strict=True))
        cycles, row["spilled"] = pipeline(found, case.trips, case.turns, case.cuts)
        return row | bounded(case, chip, cycles)
    multiply = [loop for loop in found if loop.products and loop.depth == (case.depth or loop.depth)]
    if not multiply:
        return row
    inner = sorted(multiply, key=lambda loop: loop.bundles)[case.rank]
    # where copies of a block start apart from the product, the schedule is both
    depth = inner.depth - case.around
    issue = max((loop.bundles for loop in found if loop.copies > 4 and loop.depth == depth), default=0)
    row["spilled"] = inner.spills
    row["turn"] = inner.bundles + (0 if inner.copies else issue)
    if case.turns:
        row |= bounded(case, chip, case.turns * row["turn"])
    return row


def bounded(case: Case, chip: str, cycles: int) -> dict[str, int]:
    """Cycles of a schedule, beside those of the roofline, and the longer of the two."""
    roofline = round(max(case.moved / BYTES[chip], case.flops / FLOPS[chip]) * CLOCK[chip])
    return {"schedule_cycles": cycles, "roofline_cycles": roofline, "estimated_cycles": max(cycles, roofline)}


def scheduled(found: list[Loop], nest: tuple[int, ...]) -> int:
    """Cycles of all turns of a grid's loops. nest: as a Case has it.

    The grid's own loop is the longest of depth 1. Of the others, one that multiplies runs in every turn of those that
    nest has, and one that holds such a loop in every turn but of the innermost; one that does neither keeps rows, or is
    too short to be (loops that issue copies are of 1 to 30 instructions).
    """
    steps, across, down, keeps = nest
    grid = max((loop for loop in found if loop.depth == 1), key=lambda loop: loop.bundles)
    inside = [loop for loop in found if loop.depth > 1]
    deepest = max((loop.depth for loop in inside if loop.products), default=0)
    cycles = grid.bundles
    for loop in inside:
        if loop.products and loop.depth == deepest:
            cycles += across * down * loop.bundles
        elif loop.depth < deepest:
            cycles += across * loop.bundles
        else:
            cycles += across * keeps * loop.bundles
    return steps * cycles


def peer(folder: Path) -> ModuleType | None:
    """tpu-inference's kernel, without what its package imports."""
    if not (folder / "tpu_inference").is_dir():
        return None
    name = "tpu_inference"
    for part in ("", "kernels", "ragged_paged_attention", "v3"):
        name = f"{name}.{part}" if part else name
        package = ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    return importlib.import_module(f"{name}.kernel")


def run(chip: str, peers: str, only: str) -> list[dict[str, Any]]:
    """Compile all cases for a chip, in a process of its own: the compiler's settings are read when it starts."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_STDERR_LOG_LEVEL": "3",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }
        done = subprocess.run(
            [sys.executable, "-m", "radixmesh.bench.kernels", chip, folder, peers, only],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{chip}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(chip: str, folder: str, peers: str, only: str) -> None:
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from radixmesh.bench import kernel_cases

    devices = topologies.get_topology_desc(TOPOLOGY[chip], "tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("x",))

    def shape(dims: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    rows = []
    with jax.set_mesh(mesh):
        for case in kernel_cases.cases(peer(Path(peers)) if peers else None):
            if any(name in case.name for name in only.split(",")):
                rows.append(measure(case, chip, shape, Path(folder)))
                print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
