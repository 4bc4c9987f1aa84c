"""The kernels of a step on GPUs, without a GPU: interpreted in a process of their own, and compiled for five kinds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.torch.warmup import plans
from kernels_cuda import attention
from kernels_cuda.build import build
from kernels_cuda.cases import TARGETS, Case
from kernels_cuda.step_cases import step

LLAMA: dict[str, Any] = {"hidden": 4096, "ffn": 14336, "q_heads": 32, "kv_heads": 8, "head_dim": 128, "dim": 128}
ODD: dict[str, Any] = {"hidden": 2880, "ffn": 2880, "q_heads": 9, "kv_heads": 3, "head_dim": 80, "dim": 64}
FETCH = ("norm", "row")
"""Modules whose kernels load weights before they wait for others."""
LARGE = ("noisy", "look", "keep", "settle")
"""Kernels that take seconds to compile."""
SLOW = [pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_80", "sm_100", "gfx950")]


def test_interpreted_they_are_plain_torch_and_the_normative_sampler() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted_step"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "done\n", done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("arch", TARGETS)
def test_they_compile_without_a_gpu(arch: str) -> None:
    cases = [
        *step(**LLAMA, vocab=128256, dtype=torch.bfloat16, store=torch.bfloat16),
        *step(**LLAMA, vocab=128256, dtype=torch.bfloat16, store=torch.int8),
        *step(**ODD, vocab=32000, dtype=torch.float32, store=torch.float8_e4m3fn),
    ]
    few = list({case.key: case for case in cases if case.name not in LARGE}.values())
    assert len(few) >= 11
    _compile(few, arch)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942", *SLOW])
def test_the_sampler_compiles_without_a_gpu(arch: str) -> None:
    all_of = step(**LLAMA, vocab=128256, dtype=torch.bfloat16, store=torch.bfloat16)
    cases = [case for case in all_of if case.name in LARGE]
    assert len(cases) == 9
    _compile(cases, arch)


def _compile(cases: list[Case], arch: str) -> None:
    for case in cases:
        made = build(case, arch)
        assert "error" not in made, made
        assert made["spilled"] == 0 or case.module == "angles", made  # large angles are halved over a table
        early = [name for name in made.get("early", ()) if case.module not in FETCH or not name.startswith("LDG")]
        assert not early, f"{case.name} touches what others write before it waits for them: {early}"


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_the_warm_up_has_a_plan_for_every_number_of_parts(kv_heads: int) -> None:
    wanted = {attention.splits(n, reach, 132) for n in (1, 8, 60, 4000) for reach in (128, 700, 4096, 1 << 17)}
    short = {(p.few, attention.splits(kv_heads, p.reach, p.sms)) for p in plans(kv_heads) if p.short}
    long = {attention.splits(kv_heads * attention.WAVES, p.reach, p.sms) for p in plans(kv_heads) if not p.short}
    assert wanted == long == {1, 4, 16, 64}
    assert short == {(few, parts) for few in (1, attention.FEW) for parts in wanted}
