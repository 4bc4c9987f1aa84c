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
    """Seconds, bytes of shared memory, registers and spilled bytes of a thread where they are known, or the error.
    early: of a kernel that overlaps others, loads and stores of the device's memory ahead of its wait."""
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
    if arch.startswith("gfx"):
        return row | _amd(made.asm["amdgcn"])
    return row | _nvidia(made.asm["cubin"], bool(constants.get("OVERLAP")))


def _amd(text: str) -> dict[str, int]:
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text))
    return {"registers": int(found["vgpr_count"]), "spilled": int(found["private_segment_fixed_size"])}


def _nvidia(binary: bytes, overlaps: bool) -> dict[str, Any]:
    from triton import knobs

    def told(what: str) -> str:
        return subprocess.run(
            [knobs.nvidia.cuobjdump.path, what, str(file)], capture_output=True, text=True, check=True
        ).stdout

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        found = dict(re.findall(r"(REG|STACK):(\d+)", told("--dump-resource-usage")))
        more = {"early": _early(told("--dump-sass"))} if overlaps else {}
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"])} | more


def _early(code: str) -> list[str]:
    """What touches the device's memory ahead of the wait for the kernels before; all of a kernel that has none."""
    names = r"\b(?:LDG|LDGSTS|LD|STG|ST|ATOMG?|REDG?|UBLKCP|UTMALDG|UTMASTG)\b[.A-Z0-9]*"
    return re.findall(names, code.partition("ACQBULK")[0])
