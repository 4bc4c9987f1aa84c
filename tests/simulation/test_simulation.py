"""Random configurations through the real scheduler equal sequential decoding, and planted faults are noticed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from engine.run import loop
from tests.planting import check_noticed
from tests.simulation.faults import FAULTS
from tests.simulation.scenes import SCENES, Stage
from tests.simulation.trial import balance, trial

QUICK = set(range(0, len(FAULTS), 4))
"""Faults that `make test` plants; `make test-all` plants all."""


def run(seeds: range) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in seeds:
        seen += trial(seed)
    return seen


def test_equals_sequential_decoding() -> None:
    seen = run(range(300))
    for rare in (
        "cached",
        "preempted",
        "failed",
        "aborted",
        "errors",
        "followed",
        "branched",
        "late",
        "grown",
        "shared",
    ):
        assert seen[rare] > 20, f"the trials hardly reach {rare!r}: {seen}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_equals_sequential_decoding_long() -> None:
    run(range(300, 8000))


def test_the_loop_counts_pages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Now and then; what is lost is repaired, counted and said."""
    monkeypatch.setattr(loop, "AUDIT_STEPS", 8)
    stage = Stage()
    stage.ask("long", [1, 2, 3], made=40)
    stage.to(10)
    stage.scheduler.store.pools[0].take(1)
    while stage.loop.busy:
        stage.loop.turn()
    assert len(stage.outputs["long"]) == 40
    assert stage.loop.stats().repairs == 1
    assert capsys.readouterr().err.count("pages were lost") == 1
    balance(stage.scheduler, 0)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_scene(scene: Callable[[], None]) -> None:
    scene()


@pytest.mark.parametrize(
    "number",
    [pytest.param(i, id=f.name, marks=[] if i in QUICK else pytest.mark.slow) for i, f in enumerate(FAULTS)],
)
def test_fault_is_noticed(number: int) -> None:
    check_noticed("tests.simulation.faults", FAULTS, number, 120)
