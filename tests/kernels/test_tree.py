"""The Triton kernels of rows that read the same pages: interpreted, and compiled for GPUs that need not be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from typing import Any

import pytest
import torch

from kernels_cuda import cascade
from kernels_cuda.build import build
from kernels_cuda.cases import TARGETS, Layer, branches
from tests.kernels.branches import ALLOWED, CASES, FAULTS, ROOT


@lru_cache(maxsize=1)
def found() -> list[dict[str, Any]]:
    """What the interpreter says, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.branches"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_it_equals_a_plain_softmax() -> None:
    cases = [row for row in found() if "case" in row]
    assert [row["case"] for row in cases] == list(CASES)
    for row in cases:
        assert row["error"] <= ALLOWED[CASES[row["case"]].dtype], row
        assert row["padding"] == 0, row


def test_faults_are_noticed() -> None:
    faults = {row["fault"]: row["noticed"] for row in found() if "fault" in row}
    assert len(faults) == len(FAULTS)
    assert all(faults.values()), faults


@pytest.mark.parametrize("arch", TARGETS)
def test_it_compiles(arch: str) -> None:
    """For every target, in bfloat16; what is odd for one."""
    eight = Layer(q_heads=32, kv_heads=8, head_dim=128, page=16)
    made = list(branches(eight, torch.bfloat16, torch.bfloat16, arch))
    if arch == "sm_90":
        odd = Layer(q_heads=8, kv_heads=1, head_dim=80, page=1, capped=True, sinks=True)
        made += branches(odd, torch.float16, torch.int8, arch)
    assert len(made) >= 2
    for case in made:
        row = build(case, arch)
        assert "error" not in row, row
        assert row["spilled"] <= 64, row


def test_what_is_refused() -> None:
    good: dict[str, Any] = {"head_dim": 128, "group": 4, "dtype": torch.bfloat16, "store": torch.bfloat16}
    assert cascade.refuses(**good, arch="sm_90", window=None) == ""
    assert "window" in cascade.refuses(**good, arch="sm_90", window=64)
    assert "sm_75" in cascade.refuses(**good, arch="sm_75", window=None)
