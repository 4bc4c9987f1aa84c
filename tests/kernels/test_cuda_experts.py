"""The kernels of experts on GPUs that are not here: interpreted, compiled for five of them, and all of them run when a
backend warms up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.torch.warmup import heights
from engine.model.spec import Experts
from kernels_cuda.build import build
from kernels_cuda.cases import TARGETS, Case
from kernels_cuda.expert_cases import experts
from tests.kernels.interpreted_experts import ALLOWED, CASES, FAULTS

ROOT = Path(__file__).parents[2]
QWEN: dict[str, Any] = {"hidden": 2048, "size": 768, "count": 128, "top_k": 8}
ODD: dict[str, Any] = {"hidden": 2880, "size": 360, "count": 5, "top_k": 3, "clamped": True}
LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10}
"""Bytes of shared memory that a program can have."""


@pytest.fixture(scope="module")
def interpreted() -> list[dict[str, Any]]:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted_experts"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_they_are_experts_in_float64(interpreted: list[dict[str, Any]]) -> None:
    errors = {tuple(line["case"]): line["error"] for line in interpreted if "case" in line}
    assert set(errors) == set(CASES)
    wrong = {case: error for case, error in errors.items() if not error <= ALLOWED}
    assert not wrong


def test_a_model_sends_its_tokens_through_them(interpreted: list[dict[str, Any]]) -> None:
    errors = {line["model"]: line["error"] for line in interpreted if "model" in line}
    assert set(errors) == {"", "int8", "fp8"}
    assert all(error <= ALLOWED for error in errors.values()), errors


def test_planted_faults_are_noticed(interpreted: list[dict[str, Any]]) -> None:
    errors = {line["fault"]: line["error"] for line in interpreted if "fault" in line}
    assert set(errors) == set(FAULTS)
    missed = {fault: error for fault, error in errors.items() if error < 100 * ALLOWED}
    assert not missed


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_they_compile_without_a_gpu(arch: str) -> None:
    cases = [*experts(**QWEN, dtype=torch.bfloat16, arch=arch, kind="fp8")]
    cases += [c for c in experts(**QWEN, dtype=torch.bfloat16, arch=arch) if c.function in ("_gate_up", "_down")]
    cases += [c for c in experts(**ODD, dtype=torch.float32, arch=arch) if "128" in c.name or "row" in c.name]
    _compile(cases, arch)


def test_those_of_few_tokens_and_of_many_compile_without_a_gpu() -> None:
    cases = [*experts(**QWEN, dtype=torch.bfloat16, arch="sm_90")]
    _compile([case for case in cases if case.constants.get("R") not in (32, 64)], "sm_90")


def _compile(cases: list[Case], arch: str) -> None:
    for case in cases:
        made = build(case, arch)
        assert "error" not in made, made
        assert made["spilled"] == 0, made
        assert made["shared"] <= LIMITS[arch], made


@pytest.mark.parametrize(("count", "top_k", "most"), [(128, 8, 8192), (4, 2, 100), (32, 4, 1), (512, 10, 3000)])
def test_the_warm_up_has_every_kernel(count: int, top_k: int, most: int) -> None:
    from kernels_cuda import route

    def kernels(tokens: int) -> Any:
        return tokens == 1, route.height(tokens * top_k, count), route.chunk(tokens * top_k)

    e = Experts(count=count, top_k=top_k, size=8, renormalised=True)
    found = list(heights(e, most))
    assert max(found) <= most
    assert {kernels(tokens) for tokens in found} == {kernels(tokens) for tokens in range(1, most + 1)}
