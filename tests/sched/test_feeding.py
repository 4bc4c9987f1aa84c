"""How prompts are cut into chunks."""

from __future__ import annotations

from dataclasses import replace

from engine.sampling import SamplingParams
from engine.sched.request import Request
from engine.sched.scheduler import Scheduler
from radixmesh.bench.scheduler import PAGE, Null, limits_of


def chunks(lengths: list[int], room: int) -> list[list[int]]:
    """What each step feeds of prompts of these lengths, whose answers are one token. room: tokens of a step."""
    scheduler = Scheduler(replace(limits_of(8, 4096), max_tokens=room))
    params = SamplingParams(temperature=0.0, max_new_tokens=1, ignore_eos=True)
    for i, n in enumerate(lengths):
        scheduler.submit(Request(rid=str(i), tokens=tuple(range(1000 * i, 1000 * i + n)), params=params), 0.0)
    null, out, plan = Null(scheduler), list[list[int]](), scheduler.plan

    def planned(now: float) -> object:
        made = plan(now)
        if made is not None:
            out.append([len(row.tokens) for row in made.rows])
        return made

    scheduler.plan = planned  # type: ignore[method-assign, assignment]
    while scheduler.busy:
        null.turn()
    assert sum(map(sum, out)) == sum(lengths)
    return out


def test_a_few_tokens_of_a_prompt_do_not_make_a_row_beside_others() -> None:
    assert PAGE == 16
    assert chunks([90, 90], 100) == [[90], [90]]
    assert chunks([84, 90], 100) == [[84, 16], [74]]
    assert chunks([90, 8], 100) == [[90, 8]]  # the end of a prompt is as good as any
    assert chunks([70, 70, 70], 100) == [[70, 16], [54, 32], [38]]


def test_what_comes_first_is_fed_however_little_room_there_is() -> None:
    assert chunks([25], 10) == [[10], [6], [9]]
    assert chunks([12, 20], 10) == [[10], [2], [10], [10]]
