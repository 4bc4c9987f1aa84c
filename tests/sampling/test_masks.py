"""Masks against their definition, token by token, and whether they wait for what is not there yet."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from backends.api.choice import unpack
from backends.api.limits import Limits
from engine.model.groups import CacheGroup
from engine.sampling import SamplingParams
from engine.sched.masks import Masks, masks_of
from engine.sched.request import Request
from engine.sched.scheduler import Scheduler

EOS = frozenset({3, 40})


def request(params: dict[str, Any], words: tuple[tuple[int, ...], ...] = (), rid: str = "r") -> Request:
    given = SamplingParams.of({"bad_words": "x" if words else (), "max_new_tokens": 20} | params)
    return Request(rid=rid, tokens=(1, 2), params=given, eos=EOS, bad_words=words)


def allowed(asked: Request, made: Sequence[int], vocab: int) -> list[bool]:
    """By the definition."""
    p = asked.params
    stops = {*p.stop_token_ids, *(() if p.ignore_eos else EOS)} if len(made) < p.min_new_tokens else set()
    return [
        (p.allowed_token_ids is None or v in p.allowed_token_ids)
        and v not in stops
        and not any((*made, v)[-len(w) :] == w for w in asked.bad_words)
        for v in range(vocab)
    ]


@pytest.mark.parametrize("seed", range(60))
def test_a_mask_is_what_its_sources_say(seed: int) -> None:
    rng = random.Random(seed)
    vocab = rng.choice([41, 64, 65, 96])
    params: dict[str, Any] = {"stop_token_ids": [5], "ignore_eos": rng.random() < 0.5}
    if rng.random() < 0.5:
        params["min_new_tokens"] = rng.randrange(1, 6)
    if rng.random() < 0.5:
        params["allowed_token_ids"] = rng.sample(range(vocab), 20)
    words = tuple(tuple(rng.choices((6, 7, 8), k=rng.choice([1, 2, 3, 4]))) for _ in range(rng.randrange(5)))
    asked = request(params, words)
    masks, made = masks_of(asked, vocab), list[int]()
    for _ in range(30):
        expected = allowed(asked, made, vocab)
        if masks is not None and masks.binds(len(made)):
            found = unpack(masks.mask(len(made)), vocab)
            assert found.tolist() == expected
        else:
            assert all(expected)
        made.append(rng.choice((6, 7, 8)))
        if masks is not None:
            masks.accept(made[-1:])


def test_only_what_depends_on_tokens_is_late() -> None:
    def of(params: dict[str, Any], words: tuple[tuple[int, ...], ...] = ()) -> Masks | None:
        return masks_of(request(params, words), 64)

    assert of({}) is None
    assert of({"min_new_tokens": 3, "ignore_eos": True}) is None
    early, single, several = of({"min_new_tokens": 3}), of({}, ((7,),)), of({}, ((7, 8),))
    assert early is not None
    assert single is not None
    assert several is not None
    assert (early.late, single.late, several.late) == (False, False, True)
    assert [early.binds(i) for i in range(5)] == [True] * 3 + [False] * 2


LIMITS = Limits(
    groups=(CacheGroup(kind="full", page=4, window=0),), pages=(64,), max_row_pages=(16,), slots=2, max_rows=2,
    max_tokens=32, max_len=64, vocab=64, max_edits=40, max_masks=2, depth=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("params", "words", "waits"),
    [
        ({}, (), False),
        ({"allowed_token_ids": [5, 6]}, (), False),
        ({"min_new_tokens": 9}, (), False),
        ({}, ((7,),), False),
        ({}, ((7, 8),), True),
    ],
)
def test_a_mask_known_before_its_tokens_never_stalls_the_next_step(
    params: dict[str, Any], words: tuple[tuple[int, ...], ...], waits: bool
) -> None:
    """Beside another run, two steps are planned before the first is collected; only a late mask misses the second
    unless the first is the oldest and depth is reached."""
    scheduler = Scheduler(LIMITS)
    scheduler.submit(request(params, words), 0.0)
    seen = []
    for _ in range(3):  # nothing is collected: a late mask may go one step ahead, as the loop collects the oldest first
        plan = scheduler.plan(0.0)
        seen.append(plan is not None)
        if plan is not None and not waits and params.get("allowed_token_ids"):
            assert plan.step.masked.tolist() == [True]
            masks = scheduler.masks(plan)
            assert masks is not None
            assert np.flatnonzero(unpack(masks[0, 0], 64)).tolist() == [5, 6]
    assert seen == [True, True, not waits]
