"""The cache against a plain dict of prefixes, and planted faults that the comparison notices."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.cache.faults import FAULTS
from tests.cache.machine import Machine
from tests.planting import check_noticed

QUICK = set(range(0, len(FAULTS), 4))
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
    check_noticed("tests.cache.faults", FAULTS, number, 240)
