"""What is HTTP in the HTTP face: keys on every route, ids, limits, errors, metrics, records, readiness."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

import engine.serve.exchange as exchange
import engine.serve.http as http
from engine.errors import BackendLost, ConfigError
from engine.run.messages import News
from engine.sampling import SamplingParams
from engine.serve.keys import OPEN, Traffic
from engine.serve.service import Ask
from engine.serve.sockets import listen
from tests.serve.harness import NAME, House, folder, house

KEY = "sesame"
ASK: dict[str, Any] = {"prompt": "the dog", "max_tokens": 3}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(folder(tmp_path_factory.mktemp("model")), api_key=KEY, body=1 << 16) as door:
        yield door


@pytest.fixture
def client(door: House) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=door.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield client
    door.settle()


def refused(answer: httpx.Response, status: int, param: str | None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    assert error["message"]
    return dict(error)


def test_every_route_wants_the_key_but_the_documented_few(door: House) -> None:
    routes = [r for r in door.app.routes if isinstance(r, Route)]
    assert len(routes) == len(door.app.routes) >= 13
    with httpx.Client(base_url=door.url) as stranger:
        for route in routes:
            path = route.path.replace("{id:path}", NAME)
            for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
                answer = stranger.request(method, path)
                if path in OPEN:
                    assert answer.status_code == (200 if method in ("GET", "HEAD") else 405)
                else:
                    assert answer.status_code == 401, (method, path)
        for path in ("/nothing", "/", "/livez/", "//livez", "/health/../metrics", "/%2e%2e/metrics", "/LIVEZ"):
            assert stranger.get(path).status_code == 401, path
        error = refused(stranger.get("/metrics"), 401, None, "invalid_api_key")
        assert KEY not in error["message"]


@pytest.mark.parametrize(
    ("headers", "good"),
    [
        ({"authorization": f"Bearer {KEY}"}, True),
        ({"authorization": f"bearer {KEY}"}, True),
        ({"x-api-key": KEY}, True),
        ({"authorization": KEY}, False),
        ({"authorization": f"Basic {KEY}"}, False),
        ({"authorization": f"Bearer {KEY}x"}, False),
        ({"authorization": "Bearer"}, False),
        ({"x-api-key": ""}, False),
        ({"authorization": b"Bearer \xff\xfe"}, False),
    ],
)
def test_how_a_key_is_given(door: House, headers: dict[str, Any], good: bool) -> None:
    assert httpx.get(f"{door.url}/v1/models", headers=headers).status_code == (200 if good else 401)


def test_no_such_route_and_no_such_method(client: httpx.Client) -> None:
    refused(client.get("/nothing"), 404, None, "not_found")
    refused(client.post("/v1/embeddings", json={}), 404, None, "not_found")
    answer = client.get("/v1/completions")
    refused(answer, 405, None, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_request_ids(client: httpx.Client, door: House) -> None:
    answer = client.post("/v1/completions", json=ASK, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["id"] == "cmpl-mine-1"
    assert door.records[-1].call == door.records[-1].rid == "mine-1"
    made = [client.get("/v1/models").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    for odd in ("x" * 129, "a\tb", "", "\xe9"):
        assert client.get("/v1/models", headers={"x-request-id": odd.encode("latin-1")}).headers["x-request-id"] != odd
    assert client.get("/nothing", headers={"x-request-id": "mine-2"}).headers["x-request-id"] == "mine-2"


def test_one_id_for_two_requests_at_once(client: httpx.Client, door: House) -> None:
    same = {"x-request-id": "same"}
    long = ASK | {"stream": True, "max_tokens": 100, "ignore_eos": True}
    with door.slow(0.02), client.stream("POST", "/v1/completions", json=long, headers=same) as first:
        second = client.post("/v1/completions", json=ASK, headers=same)
        assert second.headers["x-request-id"] == "same"
        assert second.json()["id"] != "cmpl-same"
        taken = client.post("/generate", json={"text": "a", "rid": "same"})
        refused(taken, 400, "rid")
        assert client.post("/abort_request", json={"rid": "cmpl-same"}).json() == {"aborted": 1}
        assert first.read().endswith(b"data: [DONE]\n\n")
    assert client.post("/generate", json={"text": "a", "rid": "same"}).json()["meta_info"]["id"] == "same"


def test_an_id_of_a_request_that_has_yet_to_end_is_another_at_its_next_use(client: httpx.Client, door: House) -> None:
    """As when a client lost patience: its first request ends with the step that it is in."""
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    with door.slow(0.02):
        calls = [door.run(door.service.open([Ask(text="a", params=params)], rid)) for rid in ("again", "many-1")]
        for name, more in (("again", {}), ("many", {"n": 2})):
            answer = client.post("/v1/completions", json=ASK | more, headers={"x-request-id": name})
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-request-id"] == name
            assert answer.json()["id"] != f"cmpl-{name}"
            refused(client.post("/v1/completions", json=ASK | more | {"rid": name}), 400, "rid")
        for call in calls:
            door.loop.call_soon_threadsafe(call.close)


def test_a_body_over_the_limit_is_refused_before_it_is_read(client: httpx.Client, door: House) -> None:
    big = b'{"prompt": "' + b"x" * (1 << 17) + b'"}'
    refused(client.post("/v1/completions", content=big), 413, "body", "request_too_large")
    refused(client.post("/v1/completions", content=iter([big])), 413, "body", "request_too_large")  # chunked
    with socket.create_connection(("127.0.0.1", door.port), timeout=10) as raw:  # nothing but a length
        head = f"POST /generate HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\ncontent-length: 99999999999\r\n\r\n"
        raw.sendall(head.encode())
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")
    fits = b'{"prompt": "the", "max_tokens": 1, "user": "' + b"x" * 60_000 + b'"}'
    assert client.post("/v1/completions", content=fits).status_code == 200


def test_any_media_type_is_taken(client: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "nonsense"):
        answer = client.post("/v1/completions", content=json.dumps(ASK), headers={"content-type": kind})
        assert answer.status_code == 200


def test_slow_and_large_heads_are_cut(door: House, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_connection(("127.0.0.1", door.port), timeout=20) as raw:
        raw.sendall(b"GET /livez HTTP/1.1\r\nx: ")
        sent = b""
        try:
            for _ in range(64):
                raw.sendall(b"y" * 4096)
            sent = raw.recv(4096)
        except OSError:
            sent = b"HTTP/1.1 400 "  # it was reset while we were writing
        assert sent.startswith(b"HTTP/1.1 400 ")
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.1)
    for start in (b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\nGET /li"):
        with socket.create_connection(("127.0.0.1", door.port), timeout=20) as raw:
            raw.sendall(start)
            while raw.recv(4096):
                pass  # until it is closed


def test_a_body_that_does_not_come(door: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(exchange, "REST_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", door.port), timeout=20) as raw:
        head = f"POST /generate HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\ncontent-length: 100\r\n\r\n" + "{"
        raw.sendall(head.encode())
        assert raw.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_connection_is_used_again(door: House, client: httpx.Client) -> None:
    before = len(connections(door))
    for body in (ASK, ASK | {"stream": True}, {"prompt": 3}, ASK):
        assert client.post("/v1/completions", json=body).status_code in (200, 400)
    assert len(connections(door)) <= before + 1


def connections(door: House) -> set[str]:
    """Established sockets on the server's port, by the peer's address."""
    out = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state = line.split()[:4]
        if state == "01" and int(local.partition(":")[2], 16) == door.port:
            out.add(remote)
    return out


def scrape(client: httpx.Client) -> dict[tuple[str, ...], float]:
    """Every sample: its name and the values of its labels, without the model's."""
    out = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for s in family.samples:
            out[s.name, *(v for k, v in sorted(s.labels.items()) if k != "model_name")] = s.value
            assert s.labels.get("model_name", NAME) == NAME
    return out


def test_metrics(client: httpx.Client, door: House) -> None:
    before = scrape(client)
    usage = client.post("/v1/completions", json=ASK | {"n": 2, "ignore_eos": True}).json()["usage"]
    refused(client.post("/v1/completions", json={"prompt": 3}), 400, "prompt")
    client.get("/nothing")
    door.settle()
    after = scrape(client)

    def grew(*name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grew("sglang:num_requests_total") == 2
    assert grew("sglang:prompt_tokens_total") == 2 * usage["prompt_tokens"]
    assert grew("sglang:generation_tokens_total") == usage["completion_tokens"] == 6
    for name in ("time_to_first_token", "e2e_request_latency", "queue_time"):
        assert grew(f"sglang:{name}_seconds_count") == grew(f"sglang:{name}_seconds_bucket", "+Inf") == 2
    assert grew("sglang:inter_token_latency_seconds_count") == 4
    assert grew("sglang:e2e_request_latency_seconds_sum") > grew("sglang:time_to_first_token_seconds_sum") > 0
    assert grew("radixmesh:requests_total", "length") == 2
    assert grew("radixmesh:http_requests_total", "/v1/completions", "200") == 1
    assert grew("radixmesh:http_requests_total", "/v1/completions", "400") == 1
    assert grew("radixmesh:http_requests_total", "other", "404") == 1
    for name in ("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:token_usage", "radixmesh:open_requests"):
        assert after[(name,)] == 0
    assert after[("radixmesh:compiles_after_ready_total",)] == 0
    assert 0 <= after[("sglang:cache_hit_rate",)] <= 1
    pages = {name[2]: value for name, value in after.items() if name[0] == "radixmesh:pages"}
    assert set(pages) == {"free", "evictable", "locked", "owned"}
    assert sum(pages.values()) == 64
    openmetrics = client.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert openmetrics.text.endswith("# EOF\n")


def test_an_answer_is_counted_before_it_is_whole() -> None:
    """Who has an answer finds it in the metrics."""
    counted: list[tuple[str, int]] = []
    sent: list[tuple[Message, int]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": scope["status"], "headers": []})
        if scope["status"] == 206:
            return  # its client went away
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})
        await asyncio.sleep(0)
        if scope["status"] == 201:
            raise ValueError("after the answer")

    async def receive() -> Message:
        raise AssertionError("nobody asks")

    async def send(message: Message) -> None:
        sent.append((message, len(counted)))

    async def body() -> None:
        traffic = Traffic(app, lambda *told: counted.append(told))
        for status in (200, 201, 206):
            with suppress(ValueError):
                await traffic({"type": "http", "headers": [], "status": status}, receive, send)

    asyncio.run(body())
    assert counted == [("other", 200), ("other", 201), ("other", 206)]
    assert [n for _, n in sent] == [0, 0, 1, 1, 1, 2, 2]
    assert dict(sent[0][0]["headers"])[b"x-request-id"]


def test_unknown_fields_are_passed_over_counted_and_said_once(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "radixmesh.http"):
        for _ in range(3):
            assert client.post("/v1/completions", json=ASK | {"frobnicate": 1}).status_code == 200
        said = {"role": "user", "content": "a", "mood": "good"}
        client.post("/v1/chat/completions", json={"messages": [said, said], "max_tokens": 1})
    assert [r.getMessage().split()[2] for r in caplog.records] == ["frobnicate", "messages[].mood"]
    after = scrape(client)
    assert after["radixmesh:unknown_fields_total", "frobnicate"] == 3
    assert after["radixmesh:unknown_fields_total", "messages[].mood"] == 2
    client.post("/v1/completions", json=ASK | {f"x{i}": 1 for i in range(500)} | {"y" * 99: 1, "é": 1})
    fields = [name for name in scrape(client) if name[0] == "radixmesh:unknown_fields_total"]
    assert len(fields) <= 65
    assert ("radixmesh:unknown_fields_total", "other") in fields


def test_a_line_of_json_for_every_request_that_ended(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "radixmesh.requests"):
        usage = client.post("/v1/completions", json=ASK, headers={"x-request-id": "logged"}).json()["usage"]
        client.post("/generate", json={"text": ["a", "the"], "sampling_params": {"max_new_tokens": 2}})
    lines = [json.loads(r.getMessage()) for r in caplog.records]
    assert [line["route"] for line in lines] == ["/v1/completions", "/generate", "/generate"]
    assert (lines[0]["request_id"], lines[0]["reason"], lines[0]["error"]) == ("logged", "length", None)
    assert lines[0]["prompt_tokens"] == usage["prompt_tokens"]
    assert lines[0]["completion_tokens"] == usage["completion_tokens"]
    for line in lines:
        assert line["total"] == pytest.approx(line["queue"] + line["prefill"] + line["decode"], abs=1e-5)
        assert min(line["queue"], line["prefill"], line["decode"]) >= 0
        assert abs(line["time"] - time.time()) < 60


def test_server_info_has_everything_but_the_key(client: httpx.Client, door: House) -> None:
    answer = client.get("/server_info")
    assert KEY not in answer.text
    told = answer.json()
    assert (told["model"], told["backend"], told["max_model_len"]) == (NAME, "reference", 192)
    assert told["config"]["serve.body"] == 1 << 16
    assert {"field": "backend", "value": "reference", "why": "backend.name"} in told["decisions"]
    assert told["limits"]["slots"] == 4
    assert told["versions"]["radixmesh"]
    assert [s["name"] for s in told["stages"]] == ["device", "weights", "programs", "tokenizer"]


def test_a_fault_of_ours_is_told_and_the_server_goes_on(
    client: httpx.Client, door: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> int:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(door.service, "abort", broken)
    answer = client.post("/abort_request", json={"rid": "a"}, headers={"x-request-id": "broke"})
    error = refused(answer, 500, None, "internal_error")
    assert answer.headers["x-request-id"] == "broke"
    assert "a fault" not in error["message"]
    door.until(lambda: any(r.exc_info and "a fault" in str(r.exc_info[1]) for r in caplog.records), "it is not logged")
    monkeypatch.undo()
    assert client.post("/abort_request", json={"rid": "a"}).json() == {"aborted": 0}


def test_readiness_while_draining_and_when_the_engine_is_gone(tmp_path: Any) -> None:
    def states() -> list[int]:
        return [client.get(f"/{name}").status_code for name in ("livez", "readyz", "health")]

    with house(folder(tmp_path), slots=1) as other, httpx.Client(base_url=other.url, timeout=60) as client:
        assert states() == [200, 200, 200]
        with other.slow(0.02), client.stream("POST", "/v1/completions", json=ASK | {"max_tokens": 20, "stream": True,
                                             "ignore_eos": True}) as running:  # fmt: skip
            drained: list[int] = []
            thread = threading.Thread(target=lambda: drained.append(other.run(other.service.drain(30))))
            thread.start()
            other.until(lambda: other.service.draining, "it does not drain")
            assert states() == [200, 503, 503]
            answer = client.post("/v1/completions", json=ASK)
            refused(answer, 503, None, "overloaded")
            assert answer.headers["retry-after"]
            assert running.read().endswith(b"data: [DONE]\n\n")
            thread.join()
        assert drained == [0]
        gone = BackendLost("the device fell off")
        other.loop.call_soon_threadsafe(other.service._deliver, News(lost=gone))
        other.until(lambda: other.service.lost is not None, "it was not told")
        assert states() == [503, 503, 503]
        assert "fell off" in client.get("/livez").json()["status"]
        error = refused(client.post("/v1/completions", json=ASK), 503, None)
        assert "fell off" in error["message"]


def test_a_port_that_is_taken_is_said_in_one_line(door: House) -> None:
    with pytest.raises(ConfigError, match=f"can't listen on 127.0.0.1:{door.port}: .*in use; free it or") as caught:
        listen("127.0.0.1", door.port)
    assert caught.value.field == "serve.port"
    with pytest.raises(ConfigError) as caught:
        listen("no.such.host.invalid", 0)
    assert caught.value.field == "serve.host"


def test_a_port_that_is_taken_while_a_model_loads_is_said_in_one_line() -> None:
    with listen("127.0.0.1", 0) as first, listen("127.0.0.1", first.getsockname()[1]) as second:
        first.listen()
        with pytest.raises(ConfigError, match=r"serve\.port: can't listen: .*in use"):
            asyncio.run(http.serve(lambda *_: None, second, lambda port: None, asyncio.Event()))


def test_a_name_of_both_has_its_ipv4_address(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))]
    both += [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]  # type: ignore[list-item]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with listen("localhost", 0) as sock:
        assert sock.family == socket.AF_INET
