"""The golden records: the 8B decode step on four chips is what was kept, and what it must keep; the others slowly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.target import Target
from radixmesh.compile import golden
from radixmesh.compile.golden import CASES, Case

FAST = [c for c in CASES if c.fast]
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, object]]:
    """Name of a fast case -> its figures now. Two at once: each is a process, whose compiler uses one core mostly."""
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda c: golden.figures(golden.measure(c)), FAST)
        return {c.name: f for c, f in zip(FAST, found, strict=True)}


@pytest.mark.parametrize("case", FAST, ids=lambda c: c.name)
def test_the_8b_step_is_as_it_was(made: dict[str, dict[str, object]], case: Case) -> None:
    now = made[case.name]
    assert golden.moved(golden.kept(case), now) == []
    chip = Target.parse(case.target).chip
    assert chip is not None
    assert now["device"] == chip.kind, "what a start would call it, by which it is known again"
    assert now["failed"] == [], "temporaries below 512 MiB, the cache kept in place, and no collective unforeseen"


def test_every_record_has_a_case() -> None:
    records = {f.stem for f in golden.FOLDER.glob("*.json")}
    assert {c.name for c in FAST} <= records <= {c.name for c in CASES}
    assert len({c.target for c in FAST}) == 4


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("case", [c for c in CASES if not c.fast], ids=lambda c: c.name)
def test_the_others_are_as_they_were(case: Case) -> None:
    assert golden.moved(golden.kept(case), golden.figures(golden.measure(case))) == []
