"""What a request may ask of the sampler: the limits of every parameter, and pairs that contradict each other."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from backends.api.limits import Limits
from engine.errors import InvalidRequest
from engine.model.groups import CacheGroup
from engine.sampling import MAX_BAD_WORDS, MAX_BIAS, SamplingParams, scoring
from engine.sched.admission import check_request
from engine.sched.request import Request

NAN, INF = float("nan"), float("inf")
LIMITS = Limits(
    groups=(CacheGroup(kind="full", page=4, window=0),), pages=(16,), max_row_pages=(16,), slots=2, max_rows=2,
    max_tokens=32, max_len=64, vocab=100, max_edits=40, max_masks=2, max_bias=4, max_history=64, max_logprobs=5,
)  # fmt: skip
BARE = Limits(
    groups=LIMITS.groups, pages=(16,), max_row_pages=(16,), slots=2, max_rows=2, max_tokens=32, max_len=64, vocab=100,
    max_edits=40,
)  # fmt: skip

GOOD: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": (0, 1, 2**31 - 1, np.int64(5)),
    "min_new_tokens": (0, 1, 128),
    "temperature": (0, 1e-9, 100, np.float64(0.5)),
    "top_p": (1e-9, 1),
    "top_k": (-1, 0, 1, 2**31 - 1),
    "min_p": (0, 1),
    "seed": (None, 0, 2**64 - 1),
    "stop": ("x", ["a", "b"], ()),
    "stop_token_ids": ([], [5], {7}),
    "ignore_eos": (True, False),
    "skip_special_tokens": (True, False),
    "no_stop_trim": (True, False),
    "repetition_penalty": (0.01, 2),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2.0, 2),
    "logit_bias": ({}, {"5": -100}, {5: 100.0}, [(5, 1)], {str(i): 1 for i in range(MAX_BIAS)}),
    "allowed_token_ids": (None, [1], (3, 2, 2)),
    "bad_words": ("x", ["a b", " c"]),
    "logprobs": (None, 0, 20),
    "prompt_logprobs": (None, 0, 20),
    "logprob_start_len": (0,),
}
BAD: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": (-1, 2**31, 1.5, True, "5"),
    "min_new_tokens": (-1, 129, 1.0, True),
    "temperature": (-1, 100.1, NAN, INF, "hot", True),
    "top_p": (0, 1.1, -1, NAN),
    "top_k": (-2, 2**31, 1.5),
    "min_p": (-0.1, 1.1, NAN),
    "seed": (-1, 2**64, 1.5),
    "stop": ([""], [3], ["x"] * 65, ["x" * 5000], 3),
    "stop_token_ids": ([-1], [2**31], ["5"], [True], [1] * 65, 5),
    "ignore_eos": (1, "yes"),
    "skip_special_tokens": (0,),
    "no_stop_trim": ("x",),
    "repetition_penalty": (0, 2.1, NAN),
    "presence_penalty": (-2.1, 2.1, NAN),
    "frequency_penalty": (-2.1, 2.1, INF),
    "logit_bias": (
        {"x": 1}, {"-5": 1}, {"05": 1}, {"5.0": 1}, {5: 101}, {5: -100.5}, {5: NAN}, {5: True}, {5: "1"}, {-1: 1},
        {2**31: 1}, {"9" * 400: 1}, [(5, 1), (5, 2)], [5], [(5,)], 5, dict.fromkeys(range(MAX_BIAS + 1), 1), {"٥": 1},
    ),
    "allowed_token_ids": ([], [-1], [2**31], [1.5], ["x"], [True], 5),
    "bad_words": ([""], [3], ["x"] * (MAX_BAD_WORDS + 1), ["x" * 5000], 3),
    "logprobs": (-1, 21, 1.5, True),
    "prompt_logprobs": (-1, 21, "x", False),
    "logprob_start_len": (-1, 2**31, 1.5, True),
}  # fmt: skip


def test_no_parameter_is_forgotten() -> None:
    assert set(GOOD) == set(BAD) == {f.name for f in fields(SamplingParams)}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in GOOD.items() for v in values])
def test_taken(name: str, value: Any) -> None:
    SamplingParams.of({name: value})


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams.of({name: value})
    assert caught.value.field == name
    assert len(str(caught.value)) < 200


PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens"),
    ({"min_new_tokens": 1, "max_new_tokens": 0}, "min_new_tokens"),
    ({"logprob_start_len": 3}, "logprob_start_len"),
    ({"logprob_start_len": 3, "logprobs": 1}, "logprob_start_len"),
]


@pytest.mark.parametrize(("given", "field"), PAIRS)
def test_contradictory(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams.of(given)
    assert caught.value.field == field


def refused(limits: Limits, params: dict[str, Any], **more: Any) -> str | None:
    """The field that is at fault."""
    request = Request(rid="r", tokens=(1, 2, 3), params=SamplingParams.of(params), eos=frozenset({0}), **more)
    try:
        check_request(request, limits, limits.max_len, ())
    except InvalidRequest as error:
        return error.field
    return None


UNHONOURED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"stop_token_ids": [100]}, {}, "stop_token_ids"),
    ({"logit_bias": {100: 1}}, {}, "logit_bias"),
    ({"logit_bias": dict.fromkeys(range(5), 1)}, {}, "logit_bias"),
    ({"allowed_token_ids": [100]}, {}, "allowed_token_ids"),
    ({"bad_words": "x"}, {}, "bad_words"),
    ({"bad_words": "x"}, {"bad_words": ((1, 100),)}, "bad_words"),
    ({"logprobs": 6}, {}, "logprobs"),
    ({"prompt_logprobs": 6}, {}, "prompt_logprobs"),
    ({"prompt_logprobs": 0, "logprob_start_len": 3}, {}, "logprob_start_len"),
    ({"min_new_tokens": 1, "allowed_token_ids": [0]}, {}, "min_new_tokens"),
    ({"min_new_tokens": 1, "allowed_token_ids": [0, 5], "stop_token_ids": [5]}, {}, "min_new_tokens"),
    ({"allowed_token_ids": [5], "bad_words": "x"}, {"bad_words": ((5,),)}, "bad_words"),
    ({"allowed_token_ids": [5], "bad_words": "x"}, {"bad_words": ((5, 5),)}, "bad_words"),
    ({"bad_words": "x"}, {"bad_words": tuple((i,) for i in range(100))}, "bad_words"),
    ({"min_new_tokens": 1, "bad_words": "x"}, {"bad_words": tuple((i,) for i in range(1, 100))}, "min_new_tokens"),
]


@pytest.mark.parametrize(("params", "more", "field"), UNHONOURED)
def test_what_a_model_or_a_backend_does_not_have(params: dict[str, Any], more: dict[str, Any], field: str) -> None:
    assert refused(LIMITS, params, **more) == field


@pytest.mark.parametrize(
    ("params", "more"),
    [
        ({"logit_bias": {99: 1}, "allowed_token_ids": [99], "logprobs": 5, "prompt_logprobs": 5}, {}),
        ({"min_new_tokens": 1, "allowed_token_ids": [0], "ignore_eos": True}, {}),
        ({"min_new_tokens": 1, "allowed_token_ids": [0, 5], "bad_words": "x"}, {"bad_words": ((5, 6), (7,))}),
        ({"prompt_logprobs": 0, "logprob_start_len": 2, "max_new_tokens": 0}, {}),
    ],
)
def test_what_can_be_honoured(params: dict[str, Any], more: dict[str, Any]) -> None:
    assert refused(LIMITS, params, **more) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("repetition_penalty", 1.5), ("presence_penalty", 1), ("frequency_penalty", 1), ("logit_bias", {1: 1}),
     ("allowed_token_ids", [1]), ("min_new_tokens", 1), ("logprobs", 0), ("prompt_logprobs", 0)],
)  # fmt: skip
def test_a_backend_that_has_nothing_refuses_by_name(name: str, value: Any) -> None:
    assert refused(LIMITS, {name: value}) is None
    assert refused(BARE, {name: value}) == name
    assert refused(BARE, {"bad_words": "x"}, bad_words=((1,),)) == "bad_words"


def test_sglangs_way_to_ask_for_logprobs() -> None:
    assert scoring(False, -1, 0)[0] == scoring(None)[0] == {}
    assert scoring(True)[0] == scoring(True, -1, 0)[0] == {"logprobs": 0}
    assert scoring(True, 3, 2)[0] == {"logprobs": 2, "prompt_logprobs": 2, "logprob_start_len": 3}
    for given, field in (
        ((False, 0, 0), "logprob_start_len"),
        ((None, None, 1), "top_logprobs_num"),
        ((True, -2, 0), "logprob_start_len"),
        ((True, 0, 21), "top_logprobs_num"),
        ((True, 0, 1.5), "top_logprobs_num"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            scoring(*given)
        assert caught.value.field == field
