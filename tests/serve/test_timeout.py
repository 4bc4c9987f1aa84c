"""A request's deadline through every face: before anything was made it is an error, afterwards the answer so far."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest

from engine.errors import InvalidRequest
from engine.run.messages import Message, Submit
from engine.sched.request import Request
from engine.serve.grpc import start_grpc
from engine.serve.pb import radixmesh_pb2 as pb
from engine.serve.pb import radixmesh_pb2_grpc as rpc
from radixmesh.engine import Engine
from tests.serve.harness import SMALL, House, folder, house

PROMPT = "the dog"
LONG = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
NATIVE = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True}
HOUR, NEVER = 3600.0, 1e-6
"""Seconds that don't pass in a test, and that have passed before a request is looked at."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def door(path: Path) -> Iterator[House]:
    with house(path, slots=1, n=4) as door:
        yield door


@pytest.fixture
def client(door: House) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=door.url, timeout=60) as client:
        yield client
    door.settle()


@contextmanager
def late(door: House, made: int) -> Iterator[None]:
    """The loop's clock jumps by two hours once so many more tokens are made."""
    loop = door.client.carrier.loop
    most, before = loop.made + made, loop.clock
    loop.clock = lambda: time.monotonic() + (2 * HOUR if loop.made >= most else 0.0)
    try:
        yield
        door.settle()
    finally:
        loop.clock = before


def test_a_request_that_waited_too_long_is_504(client: httpx.Client) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": [PROMPT, "a"], "stream": True, **LONG},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}], "n": 2, **LONG},
        "/generate": {"text": PROMPT, "sampling_params": NATIVE},
    }
    for route, body in bodies.items():
        answer = client.post(route, json=body | {"timeout": NEVER})
        assert answer.status_code == 504, answer.text
        error = answer.json()["error"]
        assert (error["param"], error["code"], error["type"]) == ("timeout", "deadline_exceeded", "server_error")
        assert error["message"].startswith("timeout: ")


def test_openai_does_not_ask_again(door: House) -> None:
    before = len(door.records)
    client = openai.OpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=2)
    with client, pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="tiny", prompt=PROMPT, extra_body={"timeout": NEVER, **LONG})
    assert caught.value.status_code == 504
    door.settle()
    assert [(r.reason, r.made_tokens) for r in door.records[before:]] == [("abort", 0)]


def test_one_that_runs_gives_what_it_has(client: httpx.Client, door: House) -> None:
    body = {"prompt": PROMPT, **LONG}
    whole = client.post("/v1/completions", json=body | {"timeout": HOUR}).json()["choices"][0]
    assert whole["finish_reason"] == "length"
    with late(door, 5):
        part = client.post("/v1/completions", json=body | {"timeout": HOUR}).json()
    assert part["usage"]["completion_tokens"] == 5
    assert part["choices"][0]["finish_reason"] == "abort"
    assert part["choices"][0]["text"]
    assert whole["text"].startswith(part["choices"][0]["text"])
    with late(door, 5), client.stream("POST", "/v1/completions", json=body | {"timeout": 60, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert choices[-1]["finish_reason"] == "abort"
    assert "".join(c["text"] for c in choices) == part["choices"][0]["text"]
    with late(door, 5):
        native = client.post("/generate", json={"text": PROMPT, "sampling_params": NATIVE, "timeout": HOUR}).json()
    assert len(native["output_ids"]) == 5
    reason = native["meta_info"]["finish_reason"]
    assert reason == {"type": "abort", "message": "timeout: it passed after 5 tokens were made"}


def test_an_answer_that_waits_beside_one_that_runs_ends_empty(client: httpx.Client, door: House) -> None:
    with late(door, 5):
        answer = client.post("/v1/completions", json={"prompt": [PROMPT, "a fox"], **LONG, "timeout": HOUR})
    assert answer.status_code == 200
    choices = answer.json()["choices"]
    assert [c["finish_reason"] for c in choices] == ["abort", "abort"]
    assert [bool(c["text"]) for c in choices] == [True, False]


@pytest.mark.parametrize("value", ["0", "-1", "1e9", "true", '"5"', "NaN"])
def test_one_out_of_range_is_refused_by_name(client: httpx.Client, value: str) -> None:
    for route, body in {"/v1/completions": '"prompt": "a"', "/generate": '"text": "a"'}.items():
        answer = client.post(route, content=f'{{{body}, "timeout": {value}}}')
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "timeout"
    answer = client.post("/generate", content=f'{{"text": "a", "sampling_params": {{"timeout": {value}}}}}')
    assert answer.status_code == 400


def test_the_engine_in_process_has_it_too(path: Path) -> None:
    with Engine(path, **SMALL) as engine:
        (out,) = engine.generate([PROMPT], sampling_params=NATIVE, timeout=NEVER)
        assert (out["output_ids"], out["meta_info"]["finish_reason"]["type"]) == ([], "abort")
        last = [*engine.stream(PROMPT, sampling_params=NATIVE, timeout=NEVER)][-1]
        assert last["meta_info"]["finish_reason"]["type"] == "abort"
        assert len(engine.generate(PROMPT, sampling_params=NATIVE, timeout=HOUR)["output_ids"]) == 60
        for value in (0, -1.0, float("nan"), 1e9, "5", True):
            with pytest.raises(InvalidRequest) as caught:
                engine.generate(PROMPT, timeout=value)
            assert caught.value.field == "timeout"


def test_the_deadline_of_an_rpc_is_the_requests(door: House) -> None:
    said: list[Request] = []
    say = door.client.say

    def listen(message: Message) -> None:
        if isinstance(message, Submit):
            said.append(message.request)
        say(message)

    server, port = door.run(start_grpc(door.service, "127.0.0.1", 0))
    door.client.say = listen  # type: ignore[method-assign]
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            ask = rpc.RadixmeshStub(channel).Generate
            request = pb.GenerateRequest(text=PROMPT, sampling=pb.SamplingParams(**NATIVE))
            assert [*ask(request)][-1].pieces[0].finish.reason == "length"
            chunks = []
            with late(door, 5), pytest.raises(grpc.RpcError) as ended:
                chunks.extend(ask(request, timeout=HOUR))
            end = chunks[-1]
            assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    finally:
        door.client.say = say  # type: ignore[method-assign]
        door.run(server.stop(0))
    assert (end.pieces[0].finish.reason, end.usage.completion_tokens) == ("abort", 5)
    assert said[0].deadline is None
    assert said[1].deadline is not None
    assert HOUR - 60 < said[1].deadline - said[1].arrival < HOUR + 60  # a client may round it up
