"""What crosses between processes comes back as it was, and bytes that are no message are named as such."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.api.limits import Limits
from backends.api.protocol import Sources, Status
from engine import errors
from engine.config import Config, load
from engine.errors import InvalidRequest, RadixmeshError, StepRefused
from engine.mesh import MeshSpec
from engine.model.groups import CacheGroup
from engine.resolve.facts import Decision
from engine.run import ipc
from engine.run.messages import Abort, Flush, Info, News, Stats, Submit
from engine.sampling import SamplingParams
from engine.sched.request import Output, Request
from engine.sched.scheduler import Account
from engine.sched.scores import Scores
from engine.sched.stop import Finish
from engine.text.words import Words

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=20).map(tuple)
U64 = st.integers(0, 2**64 - 1)
COUNT = st.integers(0, 2**40)
SECONDS = st.floats(0, 1e9)
CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, RadixmeshError)]

PARAMS = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 2**31 - 1),
    temperature=st.floats(0, 100) | st.integers(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(-1, 2**31 - 1),
    min_p=st.floats(0, 1),
    seed=st.none() | U64,
    stop=st.lists(TEXT.filter(bool), max_size=4).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple),
    ignore_eos=st.booleans(),
    skip_special_tokens=st.booleans(),
    no_stop_trim=st.booleans(),
    repetition_penalty=st.floats(0, 2, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=4).map(
        lambda given: tuple(given.items())
    ),
    allowed_token_ids=st.none() | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4).map(tuple),
    bad_words=st.lists(TEXT.filter(bool), max_size=4).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.integers(0, 20),
    logprob_start_len=st.integers(0, 2**31 - 1),
    min_new_tokens=st.integers(0, 1),
)
REQUESTS = st.builds(
    Request,
    rid=TEXT,
    tokens=TOKENS,
    params=PARAMS,
    seed=U64,
    eos=st.frozensets(st.integers(0, 2**31 - 1), max_size=4),
    stopper=st.just(None),
    grammar=st.just(None),
    arrival=SECONDS,
    priority=st.integers(-(2**63), 2**63 - 1),
    namespace=st.lists(TEXT | st.integers(-(2**63), 2**64 - 1), max_size=3).map(tuple),
    bad_words=st.lists(TOKENS, max_size=3).map(tuple),
)


@st.composite
def failures(draw: st.DrawFn) -> RadixmeshError:
    kind, message, field = draw(st.sampled_from(CLASSES)), draw(TEXT), draw(st.none() | TEXT)
    if kind is StepRefused:
        return kind(message, field=field, rows=draw(st.lists(st.integers(0, 99), max_size=3)))
    return kind(message, field=field)


FINISHES = st.builds(
    Finish, kind=st.sampled_from(("length", "stop", "abort", "error")), matched=st.none() | st.integers(0, 2**31) | TEXT
)
SCORES = st.builds(Scores, own=st.binary(max_size=40), ids=st.binary(max_size=40), top=st.binary(max_size=40))
OUTPUTS = st.builds(
    Output,
    rid=TEXT,
    tokens=TOKENS,
    finish=st.none() | FINISHES,
    cached_tokens=COUNT,
    error=st.none() | failures(),
    logprobs=st.none() | SCORES,
    prompt_logprobs=st.none() | SCORES,
)
STATUS = st.builds(
    Status,
    ready=st.booleans(),
    version=COUNT,
    programs=COUNT,
    compiles_after_ready=COUNT,
    device=TEXT,
    memory=st.dictionaries(TEXT, COUNT, max_size=3),
    sources=st.builds(Sources, planned=COUNT, bundle=COUNT, cache=COUNT, compiler=COUNT, seconds=SECONDS),
    buckets=st.lists(st.tuples(COUNT, COUNT, COUNT), max_size=3).map(tuple),
)
ACCOUNTS = st.builds(Account, free=COUNT, evictable=COUNT, locked=COUNT, owned=COUNT, total=COUNT)
STATS = st.builds(
    Stats,
    **{f.name: COUNT for f in fields(Stats) if f.name not in ("accounts", "status")},
    accounts=st.lists(ACCOUNTS, max_size=3).map(tuple),
    status=STATUS,
)
NEWS = st.builds(
    News,
    outputs=st.lists(OUTPUTS, max_size=4).map(tuple),
    begun=st.lists(st.tuples(TEXT, SECONDS), max_size=4).map(tuple),
    stats=st.none() | STATS,
    lost=st.none() | failures(),
)
GROUP = CacheGroup(kind="window", page=16, window=64, layers=(0, 2), kv_heads=2, head_dim=8)
LIMITS = Limits(
    groups=(GROUP, replace(GROUP, kind="full", window=0)),
    pages=(4, 8),
    max_row_pages=(4, 4),
    slots=2,
    max_rows=2,
    max_tokens=32,
    max_len=64,
    vocab=300,
    max_edits=9,
    token_buckets=(1, 32),
    device_draft=True,
)
VALUES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | TEXT | TOKENS
DECISIONS = st.builds(Decision, field=TEXT, value=VALUES | st.just(MeshSpec(tp=2)), why=TEXT)
INFOS = st.builds(
    Info,
    path=TEXT,
    architecture=TEXT,
    backend=TEXT,
    limits=st.just(LIMITS),
    room=COUNT,
    eos=TOKENS,
    status=STATUS,
    stages=st.lists(st.tuples(TEXT, SECONDS), max_size=4).map(tuple),
    decisions=st.lists(DECISIONS, max_size=4).map(tuple),
)


WORDS = st.builds(
    Words,
    names=st.lists(st.none() | TEXT, max_size=4).map(tuple),
    special=st.frozensets(TEXT, max_size=2),
    decoder=TEXT,
    cleanup=st.booleans(),
    eos=st.none() | st.integers(0, 9),
)


def plain(value: Any) -> Any:
    """Something that can be compared: errors and requests are compared by identity."""
    if isinstance(value, RadixmeshError):
        return type(value), str(value), value.field, getattr(value, "rows", None)
    if isinstance(value, (list, tuple)):
        return type(value), [plain(v) for v in value]
    if hasattr(value, "__dataclass_fields__"):
        return type(value), {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if hasattr(value, "__struct_fields__"):
        return type(value), {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    return value


@settings(deadline=None, max_examples=60)
@given(st.builds(Submit, request=REQUESTS) | st.builds(Abort, rid=TEXT) | st.builds(Flush, rid=TEXT) | WORDS)
def test_orders_come_back(order: ipc.Order) -> None:
    assert plain(ipc.decode_order(ipc.encode_order(order))) == plain(order)


@settings(deadline=None, max_examples=60)
@given(NEWS | st.builds(ipc.Ready, INFOS) | st.builds(ipc.Failed, failures()) | st.builds(ipc.Stage, TEXT))
def test_reports_come_back(report: ipc.Report) -> None:
    assert plain(ipc.decode_report(ipc.encode_report(report))) == plain(report)


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        load(None, {"model": "m", "mesh": "tp=2", "cache.fraction": 1, "token_buckets": [1, 8], "api_key": "é"}),
    ],
)
def test_configurations_come_back(config: Config) -> None:
    begin = ipc.Begin(config=config, default="d", words=True, began=1.5)
    assert ipc.decode_order(ipc.encode_order(begin)) == begin
    assert ipc.decode_order(ipc.encode_order(ipc.Shutdown())) == ipc.Shutdown()


def request(**more: Any) -> Request:
    params = more.pop("params", {})
    return Request(**{"rid": "r", "tokens": (1, 2), "params": SamplingParams(**params)} | more)


def test_numbers_of_numpy_cross_as_numbers() -> None:
    given = request(tokens=(np.int64(7),), params={"max_new_tokens": np.int32(3), "temperature": np.float64(0.5)})
    back = ipc.decode_order(ipc.encode_order(Submit(request=given)))
    assert isinstance(back, Submit)
    assert (back.request.tokens, back.request.params.max_new_tokens, back.request.params.temperature) == ((7,), 3, 0.5)
    assert type(back.request.tokens[0]) is int


def test_a_stopper_stays_here() -> None:
    back = ipc.decode_order(ipc.encode_order(Submit(request=request(stopper=object()))))
    assert isinstance(back, Submit)
    assert back.request.stopper is None


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (request(grammar=object()), "grammar"),
        (request(namespace="tenant"), "namespace"),
        (request(namespace=(1.5,)), "namespace"),
        (request(namespace=(True,)), "namespace"),
        (request(namespace=(2**64,)), "namespace"),
        (request(rid="\ud800"), "rid"),
        (request(tokens=(1, 2**64)), "tokens"),
        (request(tokens=(1, "a")), None),
        (request(params={"stop": ("\ud800",)}), "stop"),
    ],
)
def test_what_can_not_cross_is_refused_by_name(given: Request, field: str | None) -> None:
    if field is None:  # a fault of ours: the other side names it
        frame = ipc.encode_order(Submit(request=given))
        with pytest.raises(ipc.Malformed, match="tokens"):
            ipc.decode_order(frame)
        return
    with pytest.raises(InvalidRequest, match=field) as error:
        ipc.encode_order(Submit(request=given))
    assert error.value.field == field


def test_an_error_crosses_whatever_it_quotes() -> None:
    back = ipc.decode_report(ipc.encode_report(News(lost=errors.BackendLost("half \ud83d of it"))))
    assert isinstance(back, News)
    assert str(back.lost) == "half \\ud83d of it"


def test_an_error_of_no_known_class_is_the_root() -> None:
    frame = msgspec.msgpack.encode(["failed", ["SystemExit", "x", None]])
    back = ipc.decode_report(frame)
    assert isinstance(back, ipc.Failed)
    assert type(back.error) is RadixmeshError


def test_parameters_are_checked_again() -> None:
    frame = ipc.encode_order(Submit(request=request()))
    wrong = msgspec.msgpack.decode(frame)
    wrong[1]["request"]["params"]["top_p"] = 7.0
    with pytest.raises(ipc.Malformed, match="top_p"):
        ipc.decode_order(msgspec.msgpack.encode(wrong))


FRAMES = [
    ipc.encode_order(Submit(request=request(namespace=("a", 1)))),
    ipc.encode_order(ipc.Begin(config=Config(), default="d", words=False, began=0.0)),
    ipc.encode_report(News(outputs=(Output(rid="r", tokens=(1,), error=InvalidRequest("x", field="y")),))),
]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_bytes_that_are_no_message(data: st.DataObject) -> None:
    frame = bytearray(data.draw(st.sampled_from(FRAMES)))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))
    for made in (bytes(frame), bytes(frame[:cut]), data.draw(st.binary(max_size=40))):
        for decode in (ipc.decode_order, ipc.decode_report):
            with suppress(ipc.Malformed):  # anything else is a failure
                decode(made)


def test_deep_nesting_is_no_message() -> None:
    for frame in (b"\x91" * 100_000, b"\x81\xa1a" * 100_000, b""):
        with pytest.raises(ipc.Malformed):
            ipc.decode_order(frame)
