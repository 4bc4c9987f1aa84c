"""Quantised products on GPUs that are not here: interpreted, and compiled for five of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.interpreted_quantised import ALLOWED, CASES, FAULTS

ROOT = Path(__file__).parents[2]
triton = pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreted() -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.kernels.interpreted_quantised"]
    ran = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_products_are_right(interpreted: list[dict[str, Any]]) -> None:
    errors = {tuple(line["case"]): line["error"] for line in interpreted if "case" in line}
    assert set(errors) == set(CASES)
    wrong = {case: error for case, error in errors.items() if not error <= ALLOWED[case[0]]}
    assert not wrong


def test_planted_faults_are_noticed(interpreted: list[dict[str, Any]]) -> None:
    noticed = {line["fault"]: line["noticed"] for line in interpreted if "fault" in line}
    assert set(noticed) == set(FAULTS)
    assert all(noticed.values()), noticed


NUMBERS = dict.fromkeys(("rows", "columns", "inner", "width", "share", "tall", "w_stride", "many"), "i32")
WIDE = {"x": "*bf16", "w": "*u8", "scale": "*fp32", "out": "*bf16"} | NUMBERS
NARROW = {"x": "*fp8e4nv", "own": "*fp32", "w": "*fp8e4nv", "scale": "*fp32", "out": "*bf16"} | NUMBERS
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
BITS = ("sm_80", "gfx942")
"""Without float8_e4m3fn in hardware."""


def compiled(kernel: Any, target: str, types: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """A kernel built for a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    on = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or (name in ("inner", "w_stride", "many") and name not in constants)
    }
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=on, options=options)


@pytest.mark.parametrize("target", TARGETS)
def test_they_compile(target: str) -> None:
    """Those of Llama 3.1 8B, a row and 64, by blocks; int8 once. The chip's own instructions are used where it has
    them."""
    from triton import language as tl

    from kernels_cuda import quantised_matmul as wide
    from kernels_cuda import row
    from kernels_cuda import scaled_matmul as narrow

    kinds = [("bits", True), ("int8", False)] if target in BITS else [("native", True), ("int8", False)]
    for kind, blocked in kinds:
        some, chunk, warps = row.shape(4096, 14336, 1)
        one: dict[str, Any] = {"inner": 14336, "SOME": some, "CHUNK": chunk, "LANE": 16, "KIND": kind, "ACT": 0}
        one |= {"BLOCKED": blocked, "OVERLAP": target in ("sm_90", "sm_100")}
        compiled(row._row_times, target, WIDE, one, num_warps=warps, num_stages=1)
        b = wide.choose(64, 4096, 14336, "block")
        constants = {"KIND": kind, "BLOCKED": blocked, "EVEN": True, "C": b.columns, "I": b.inner}
        constants |= {"R": b.rows, "WIDE": tl.bfloat16}
        made = compiled(wide._few_rows, target, WIDE, constants, num_warps=b.warps, num_stages=b.stages)
        assert made.metadata.shared <= (160 << 10 if target == "gfx950" else 163 << 10)
        if kind == "native" and target.startswith("sm"):
            assert "cvt.rn.f16x2.e4m3x2" in made.asm["ptx"]
    if target not in BITS:
        rows, columns, inner, warps, stages = narrow.BLOCKS["block"]
        sizes = {"R": rows, "C": columns, "I": inner, "GROUP": narrow.GROUP}
        constants = {"BLOCKED": True, "EVEN": True, "WIDE": None} | sizes
        compiled(narrow._product, target, NARROW, constants, num_warps=warps, num_stages=stages)
        types = WIDE | {"out": "*fp8e4nv"}
        compiled(narrow._narrow, target, types, {"I": 4096, "BLOCKED": True}, num_warps=4)


def test_how_a_chip_multiplies() -> None:
    from backends.torch.params import choose_how

    assert choose_how((8, 0), "13.0", "fp8") == "bits"
    assert choose_how((8, 9), "13.0", "fp8") == "narrow"
    assert choose_how((9, 0), "13.0", "fp8") == "library"
    assert choose_how((9, 0), "12.8", "fp8") == "narrow"
    assert choose_how((9, 0), "13.0", "wide") == "native"
    assert choose_how((10, 0), "13.0", "fp8") == "narrow"
    assert choose_how((9, 4), "", "fp8") == "bits"
    assert choose_how((9, 5), "", "fp8") == "narrow"


def test_what_is_refused_is_multiplied_plainly() -> None:
    from kernels_cuda import quantised_matmul as wide
    from kernels_cuda import scaled_matmul as narrow

    x, w = torch.zeros(2, 32, dtype=torch.bfloat16), torch.zeros(32, 32, dtype=torch.float8_e4m3fn)
    assert wide.supports(x, w) == ""
    assert "float32" in wide.supports(x.float(), w)
    assert "lines of 24" in wide.supports(x[:, :24], w[:, :24].contiguous())
    assert narrow.supports(x, w, "row", library=True) == ""
    assert "multiples of 128 x 512" in narrow.supports(x, w, "block", library=True)
    for columns, why in ((512, False), (256, True)):
        w = torch.zeros(128, columns, dtype=torch.float8_e4m3fn)
        assert bool(narrow.supports(torch.zeros(2, columns, dtype=torch.bfloat16), w, "block", library=True)) == why
    assert "int8" in narrow.supports(x, w.view(torch.int8), "row")
