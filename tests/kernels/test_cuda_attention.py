"""Triton's attention, interpreted in a process of its own: random ragged steps, and planted faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

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
    return {line.get("case") or line["fault"]: line for line in lines}


@pytest.mark.parametrize("case", interpreted.CASES)
def test_a_ragged_step_is_that_of_a_plain_reference(case: str, told: dict[str, dict[str, Any]]) -> None:
    assert interpreted.right(told[case]), told[case]


@pytest.mark.parametrize("fault", interpreted.FAULTS)
def test_a_planted_fault_is_noticed(fault: str, told: dict[str, dict[str, Any]]) -> None:
    assert told[fault]["noticed"]
