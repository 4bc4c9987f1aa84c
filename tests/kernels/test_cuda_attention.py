"""Triton's attention: random ragged steps and planted faults, interpreted in a process of its own; compiled for GPUs
that are not here; and what is chosen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from kernels_cuda.attention import FLOAT8, choose, plan, splits, supports, whole
from kernels_cuda.build import build
from kernels_cuda.cases import TARGETS, Case, Layer, attention
from tests.kernels import interpreted


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, Any]]:
    """What the process said, by case and by fault."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted", "7"],
        cwd=interpreted.ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line.get("case") or line.get("backend") or line["fault"]: line for line in lines}


@pytest.mark.parametrize("case", interpreted.CASES)
def test_a_ragged_step_is_that_of_a_plain_reference(case: str, told: dict[str, dict[str, Any]]) -> None:
    assert interpreted.right(told[case]), told[case]


def test_fresh_prompts_attend_over_their_own_keys(told: dict[str, dict[str, Any]]) -> None:
    found = told["fresh prompts"]
    assert found["error"] < 2e-3
    assert found["clean"]


@pytest.mark.parametrize("backend", interpreted.BACKENDS)
def test_the_backend_makes_the_same_tokens_with_it(backend: str, told: dict[str, dict[str, Any]]) -> None:
    assert told[backend]["same"]


@pytest.mark.parametrize("fault", interpreted.FAULTS)
def test_a_planted_fault_is_noticed(fault: str, told: dict[str, dict[str, Any]]) -> None:
    assert told[fault]["noticed"]


PLAIN = Layer(q_heads=8, kv_heads=2, head_dim=128, page=8)
ODD = Layer(q_heads=6, kv_heads=2, head_dim=80, page=8, window=100, capped=True, sinks=True)


@pytest.mark.parametrize("arch", TARGETS)
def test_it_compiles_for(arch: str) -> None:
    """In bfloat16, nothing spilled where the matrix units are wide enough; and an odd layer over a cache of 8 bits."""
    half = torch.bfloat16
    cases: list[Case] = [
        *attention(PLAIN, half, half, arch, (1,), (2,)),
        *attention(PLAIN, half, half, arch, (0,), (1,)),
        *attention(ODD, half, FLOAT8, arch, (4,), (1,)),
    ]
    assert len({case.key for case in cases}) == len(cases) == 4 + (arch in ("sm_90", "sm_100"))
    for case in cases:
        made = build(case, arch)
        assert "error" not in made, made
        assert made["shared"] <= (64 if arch.startswith("gfx") else 163) << 10, made
        assert made["spilled"] <= 64, made


def test_what_is_chosen_and_why() -> None:
    asked = {"platform": "cuda", "arch": "sm_90", "triton": True, "head_dim": 128, "group": 4}
    half = {"dtype": torch.bfloat16, "store": torch.bfloat16}
    name, said = choose(**asked, **half)
    assert (name, said.split("; ")[0]) == (
        "triton",
        "Triton over pages on sm_90, head 128, bfloat16 cache, prompts from 1024 tokens on by Hopper's copy engine",
    )
    assert "not FlashInfer, which is not installed" in said
    assert choose(**asked, **half, flashinfer=True)[1].endswith("not FlashInfer, which is slower")
    assert "copy engine" not in choose(**asked, **half, plain=False)[1]
    assert choose(**asked | {"arch": "sm_80"}, **half)[1] == "Triton over pages on sm_80, head 128, bfloat16 cache"
    for change, why in (
        ({"platform": "cpu"}, "no GPU"),
        ({"triton": False}, "pip install triton"),
        ({"head_dim": 36}, "head 36 is no multiple of 8"),
        ({"group": 65}, "more than 64"),
        ({"store": torch.float16}, "float16 is not read with queries of torch.bfloat16"),
        ({"arch": "sm_75"}, "older than sm_80"),
    ):
        name, said = choose(**(asked | half | change))
        assert name == "plain"
        assert why in said
    assert not supports(80, 7, torch.float16, torch.int8, "gfx942")


def test_a_plan_is_of_numbers_that_repeat() -> None:
    """Decode steps of one size share a plan however long their rows are, up to powers of two; prompts of which nothing
    is cached are told, unless a row is short or padding is among them."""
    assert plan([1] * 8, 700, sms=132) == plan([1] * 8, 1000, sms=132)
    mixed = plan([1, 5, 16, 17, 300], 900, sms=132, rows=8, tokens=512)
    assert (mixed.short, mixed.few, mixed.padded, mixed.fresh) == (3, 16, True, False)
    fresh = plan([600, 700], 700, sms=132, fresh=True)
    half = torch.bfloat16
    assert whole(fresh, "sm_90", 128, half, half)
    assert not whole(fresh, "sm_80", 128, half, half)
    assert not whole(fresh, "sm_90", 128, half, FLOAT8)
    assert not whole(fresh, "sm_90", 128, half, half, plain=False)
    assert not plan([9, 700], 700, sms=132, fresh=True).fresh
    assert not plan([600, 700], 700, sms=132, fresh=True, rows=4).fresh
    assert splits(8, 1024, 132) == 16
    assert splits(2048, 1024, 132) == 1
