"""What a request may ask of the scheduler, and what crosses to its process."""

from __future__ import annotations

import math

import pytest

from engine.errors import InvalidRequest
from engine.run.ipc import decode_order, encode_order
from engine.run.messages import Submit
from engine.sampling import SamplingParams
from engine.sched.request import Request
from engine.sched.scheduler import Scheduler
from radixmesh.bench.scheduler import limits_of


def request(**fields: object) -> Request:
    return Request(rid="r", tokens=(1, 2, 3), params=SamplingParams(), **fields)


@pytest.mark.parametrize("deadline", [math.nan, math.inf, -math.inf])
def test_a_deadline_is_finite(deadline: float) -> None:
    scheduler = Scheduler(limits_of(1, 4096))
    with pytest.raises(InvalidRequest) as caught:
        scheduler.submit(request(deadline=deadline), 0.0)
    assert caught.value.field == "deadline"
    assert not scheduler.busy


def test_what_the_scheduler_reads_crosses() -> None:
    said = request(deadline=12.5, priority=-3, group="answers", namespace=("tenant", 7))
    order = decode_order(encode_order(Submit(request=said)))
    assert isinstance(order, Submit)
    got = order.request
    assert (got.deadline, got.priority, got.group, got.namespace) == (12.5, -3, "answers", ("tenant", 7))
