"""Compiles a case for a GPU that need not be here, and reads what the compiler says of it."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from kernels_cuda.cases import Case

EVEN = ("w_stride", "many")
"""Numbers that are multiples of 16."""
LOOSE = ("first", "start", "base", "table", "sinks", "scales")


def build(case: Case, arch: str) -> dict[str, Any]:
    """Seconds, bytes of shared memory, registers and spilled bytes of a thread where they are known, or the error."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    kernel = getattr(importlib.import_module(f"kernels_cuda.{case.module}"), case.function)
    names = list(kernel.arg_names)
    constants, options = dict(case.constants), dict(case.options)
    if "OVERLAP" in names:
        overlaps = arch.startswith("sm_") and int(arch[3:]) >= 90
        constants |= {"OVERLAP": overlaps}
        options |= {"launch_pdl": True} if overlaps else {}
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if (signature[name].startswith("*") and name not in LOOSE) or name in EVEN
    }
    row: dict[str, Any] = {"case": case.name, "arch": arch}
    begin = time.perf_counter()
    try:
        form = GluonASTSource if kernel.is_gluon() else ASTSource
        source = form(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
        made = triton.compile(source, target=target, options=options)
    except Exception as error:  # noqa: BLE001 whatever a compiler says is the figure
        return row | {"error": " ".join(str(error).split())[-300:]}
    row |= {"compile_s": round(time.perf_counter() - begin, 2), "shared": made.metadata.shared}
    return row | (_amd(made.asm["amdgcn"]) if arch.startswith("gfx") else _nvidia(made.asm["cubin"]))


def _amd(text: str) -> dict[str, int]:
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text))
    return {"registers": int(found["vgpr_count"]), "spilled": int(found["private_segment_fixed_size"])}


def _nvidia(binary: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        said = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", said))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"])}
