"""The cache against a plain dict of prefixes, and planted faults that the comparison notices."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.cache.faults import FAULTS
from tests.cache.machine import Machine
from tests.simulation.faults import ROOT

QUICK = set(range(0, len(FAULTS), 2))
"""Faults that `make test` plants; `make test-all` plants all."""


def run(examples: int) -> None:
    once = settings(
        max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Machine, settings=once)


def test_the_cache_is_a_dict_of_prefixes() -> None:
    run(60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_cache_is_a_dict_of_prefixes_long() -> None:
    run(2000)


@pytest.mark.parametrize(
    "number",
    [pytest.param(i, id=f.name, marks=[] if i in QUICK else pytest.mark.slow) for i, f in enumerate(FAULTS)],
)
def test_fault_is_noticed(number: int) -> None:
    command = [sys.executable, "-m", "tests.cache.faults", str(number)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, f"{FAULTS[number].name}: {done.stdout}{done.stderr}"
    assert done.stdout.startswith("noticed: "), done.stdout + done.stderr
