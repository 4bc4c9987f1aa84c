"""check_step and check_masks: good steps pass, each violation is refused with its field and rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from backends.api.build import Row, build
from backends.api.check import check_masks, check_step, tap_names
from backends.api.conformance.violations import change, put, violations
from backends.api.limits import Limits
from backends.api.step import ScheduleStep, StateTable
from engine.errors import StepRefused
from engine.model.groups import CacheGroup

GROUPS = (
    CacheGroup(kind="full", page=4, layers=(0,)),
    CacheGroup(kind="window", page=4, window=8, layers=(1,)),
)
BARE = Limits(
    groups=GROUPS,
    pages=(20, 10),
    max_row_pages=(16, 16),
    max_edits=24,
    slots=9,
    max_rows=5,
    max_tokens=12,
    max_len=60,
    vocab=100,
)
BUILT = replace(
    BARE,
    max_draft=3,
    device_draft=True,
    max_masks=5,
    max_copies=4,
    max_bias=6,
    max_history=8,
    max_logprobs=5,
    adapters=2,
    taps=True,
)


def going(count: int = 3, **values: Any) -> list[Row]:
    """Rows that go on with one token each."""
    return [Row(slot=2 * i, tokens=[-1], upper=10 + i, **values) for i in range(count)]


def refusal(step: ScheduleStep, limits: Limits) -> StepRefused:
    with pytest.raises(StepRefused) as found:
        check_step(step, limits)
    return found.value


@pytest.mark.parametrize("limits", [BARE, BUILT], ids=["bare", "built"])
def test_every_violation_is_refused_by_name(limits: Limits) -> None:
    good = build(limits, 7, going())
    check_step(good, limits)
    found = list(violations(good, limits))
    assert len(found) > 120
    for bad in found:
        error = refusal(bad.step, limits)
        assert error.field == bad.field, f"{bad.what}: {error}"
        assert str(error).startswith(bad.field), error
        assert bad.what != "a feature that is not built" or "not built" in str(error) or bad.field == "taps", error
        assert bad.rows is None or error.rows == bad.rows, f"{bad.what}: {error.rows}"
        with pytest.raises(StepRefused) as again:  # beside a step that passed, of which it has all that is not bad
            check_step(bad.step, limits, good)
        assert (again.value.field, again.value.rows) == (error.field, error.rows), bad.what


def test_good_steps_pass() -> None:
    rows = [
        Row(slot=3, tokens=[0, 99, 5], start=0, upper=3, output=0, next=17),
        Row(slot=0, tokens=[-1, 4, -2, -3], upper=20, drafts=2, temperature=1.0, top_k=2**31 - 1, seed=2**64 - 1),
        Row(slot=8, tokens=[7], start=59, upper=60, base=(0, 52), history=[(99, 0), (99, 1)], penalty=(0.1, -2, 2)),
        Row(slot=1, tokens=[-1], upper=63, masked=True, bias=[(5, -100.0)], min_p=1.0, top_p=1e-7),
    ]
    edits = [[(3, 0, 19), (3, 1, 0), (7, 15, 3)], [(3, 0, 9)]]
    names = tuple(sorted(tap_names(2)))
    step = build(BUILT, 0, rows, edits, copies=[(0, 0, 19, 3), (1, 0, 9, 9)], taps=names)
    check_step(
        replace(step, shared=np.array([[1, 2, 0, 3]], np.int32), adapters=np.array([0, 1, 2, 0], np.int32)), BUILT
    )
    check_step(change(step, sampling_logprobs=np.array([-1, 0, 5, 3], np.int32)), BUILT)
    scores = np.array([[1, 0], [3, 5], [59, 0], [-1, -1]], np.int32)
    assert refusal(change(step, sampling_prompt_logprobs=scores), BUILT).rows == (2,)  # the slot holds 59 positions
    scores[2] = -1
    check_step(change(step, sampling_prompt_logprobs=scores), BUILT)


def test_a_shared_prefix_is_cached_also_where_a_step_shares_the_rest() -> None:
    step = replace(build(BUILT, 0, going()), shared=np.array([[1, 2, 0, 7]], np.int32))
    check_step(step, BUILT)
    assert check_step(replace(step, step=1, upper=step.upper + 1), BUILT, step)
    with pytest.raises(StepRefused, match="not cached") as error:
        check_step(replace(step, step=1, upper=np.array([10, 11, 8], np.int32)), BUILT, step)
    assert error.value.rows == (2,)


def test_the_limits_are_inclusive() -> None:
    full = [*going(4), Row(slot=8, tokens=[3] * 8, start=0, upper=8)]
    check_step(build(BARE, 0, full), BARE)
    error = refusal(build(BARE, 0, [*full[:4], replace(full[4], tokens=[3] * 9, upper=9)]), BARE)
    assert error.field == "tokens"
    edits = [[(slot, i, 0) for slot in range(2) for i in range(12)], []]
    check_step(build(BARE, 0, going(1), edits), BARE)
    assert refusal(build(BARE, 0, going(1), [[*edits[0], (4, 4, 4)], []]), BARE).field == "tables.0.edits"
    masked = build(BUILT, 0, going(5, masked=True))
    check_step(masked, BUILT)
    assert refusal(masked, replace(BUILT, max_masks=4)).field == "masked"
    history = build(BUILT, 0, [Row(slot=0, tokens=[1], start=0, upper=1, history=[(1, 0)] * 9)])
    assert refusal(history, BUILT).field == "sampling.history"


@pytest.mark.parametrize(
    ("row", "field", "what"),
    [
        ({"tokens": [-1, -2], "drafts": 0}, "tokens", "a draft of the device that is not verified"),
        ({"tokens": [-1, -5], "drafts": 1}, "tokens", "the fourth of three"),
        ({"tokens": [3, -1], "drafts": 1}, "tokens", "-1 as a guess"),
        ({"history": [(5, 0)]}, "sampling.history", "history of a row that goes on"),
        ({"bias": [(100, 1.0)]}, "sampling.bias", "past the vocabulary"),
        ({"bias": [(1.5, 1.0)]}, "sampling.bias", "half a token"),
        ({"bias": [(-1, 1.0)]}, "sampling.bias", "negative"),
        ({"bias": [(1, float("nan"))]}, "sampling.bias", "not a number"),
        ({"penalty": (0.0, 0, 0)}, "sampling.penalty", "repetition of 0"),
        ({"masked": True, "output": 0}, "masked", "a mask for a silent row"),
    ],
)
def test_features_that_are_built_have_their_rules(row: dict[str, Any], field: str, what: str) -> None:
    bad = Row(**({"slot": 5, "tokens": [-1], "upper": 20} | row))
    error = refusal(build(BUILT, 0, [*going(2), bad]), BUILT)
    assert error.field == field, f"{what}: {error}"
    assert error.rows in ((2,), ()), what


def test_window_tables() -> None:
    """A seated row of length 20 sees from 20 - 8 + 1 = 13 on, so that its table may begin at 12 and not at 16."""
    rows = [Row(slot=0, tokens=[1], start=20, upper=21, base=(0, 12))]
    check_step(build(BARE, 0, rows), BARE)
    late = build(BARE, 0, [replace(rows[0], base=(0, 16))])
    assert (refusal(late, BARE).field, refusal(late, BARE).rows) == ("tables.1.base", (0,))
    check_step(build(BARE, 0, [replace(rows[0], start=-1, tokens=[-1], upper=30, base=(0, 16))]), BARE)


def test_state_tables() -> None:
    limits = replace(BARE, groups=(GROUPS[0], CacheGroup(kind="state", page=0, layers=(1,))))
    step = build(limits, 0, going())
    read, write = np.array([-1, 9, 0], np.int32), np.array([0, 9, 1], np.int32)
    table = StateTable(read=read, write=write)
    check_step(replace(step, tables=(step.tables[0], table)), limits)
    assert refusal(step, limits).field == "tables.1"
    for name in ("read", "write"):
        longer = replace(table, **{name: np.zeros(4, np.int32)})
        assert refusal(replace(step, tables=(step.tables[0], longer)), limits).field == f"tables.1.{name}"
    for name, value in (("read", -2), ("read", 10), ("write", -1), ("write", 10)):
        bad = replace(table, **{name: put(getattr(table, name), 1, value)})
        error = refusal(replace(step, tables=(step.tables[0], bad)), limits)
        assert (error.field, error.rows) == (f"tables.1.{name}", (1,))


def test_whole_rows() -> None:
    limits = replace(BARE, whole_rows=True)
    check_step(build(limits, 0, going()), limits)
    assert refusal(build(limits, 0, going(output=0)), limits).field == "output"


def test_masks() -> None:
    rows = [replace(row, masked=i > 0, tokens=[-1, 3], drafts=1) for i, row in enumerate(going())]
    step, good = build(BUILT, 0, rows), np.full((2, 4, 4), 2**32 - 1, np.uint32)
    check_masks(good, step, BUILT)
    check_masks(put(good, (0, 2), 0), step, BUILT)  # no token is chosen at place 2
    check_masks(None, build(BUILT, 0, going()), BUILT)
    for bad, picked in (
        (None, ()),
        (good[:1], ()),
        (good[:, :3], ()),
        (good.astype(np.int64), ()),
        (put(good, (1, 1), 0), (2,)),
        (put(put(good, (0, 0), 0), (0, 0, 3), 2**32 - 16), (1,)),  # only bits past the vocabulary
    ):
        with pytest.raises(StepRefused) as found:
            check_masks(bad, step, BUILT)
        assert (found.value.field, found.value.rows) == ("masks", picked)
    with pytest.raises(StepRefused):
        check_masks(good, build(BUILT, 0, going()), BUILT)


def test_nothing_but_a_refusal_comes_of_random_corruption() -> None:
    """Extreme values anywhere are refused or harmless: no other exception, no overflow that wraps into range."""
    draw, extremes = np.random.default_rng(0), (-(2**31), 2**31 - 1, -1, 0, 1, 99, 100)
    rows = [*going(2), Row(slot=5, tokens=[1, 2], start=3, upper=5, history=[(1, 0)], bias=[(2, 0.5)])]
    good = build(BUILT, 0, rows, [[(5, 0, 1), (5, 1, 2)], [(5, 1, 3)]], copies=[(0, 0, 1, 2)])
    names = ["slots", "starts", "lens", "upper", "drafts", "tokens", "next", "adapters", "copies", "sampling_history"]
    refused = 0
    for _ in range(1500):
        fields: dict[str, Any] = {}
        for name in draw.choice(names, 2, replace=False):
            array = getattr(good.sampling if name.startswith("sampling_") else good, name.removeprefix("sampling_"))
            at = tuple(int(draw.integers(n)) for n in array.shape)
            fields[str(name)] = put(array, at, int(draw.choice(extremes)))
        try:
            check_step(change(good, **fields), BUILT)
        except StepRefused:
            refused += 1
            continue
        left = change(good, **fields)
        assert (left.upper <= BUILT.max_len + BUILT.max_draft).all()
        assert (left.starts.astype(np.int64) + left.lens <= BUILT.max_len + BUILT.max_draft).all()
        assert left.lens.sum() == len(left.tokens)
    assert 750 < refused < 1500
