"""The gRPC face over a loopback port, as grpcurl would use it: a plain channel of grpcio and what reflection tells."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import uvloop
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import engine.serve.grpc as face
from engine.config import Serve, load
from engine.errors import BackendLost, ConfigError
from engine.run.local import LocalClient
from engine.run.start import decide, start
from engine.sampling import SamplingParams
from engine.serve.pb import radixmesh_pb2 as pb
from engine.serve.pb import radixmesh_pb2_grpc as rpc
from engine.serve.service import Ask, Service
from engine.text.tokenizer import Tokenizer
from tests.serve.harness import Slow, slowed
from tests.text.made import byte_level
from tests.tiny import tiny

ROOT = Path(__file__).parent.parent.parent
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
SMALL = {"slots": 4, "max_tokens": 32, "cache_tokens": 1024, "backend": "reference"}
KEY = "sesame"
LONG = {"max_new_tokens": 150, "ignore_eos": True, "temperature": 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """A service with a gRPC server on an event loop of its own thread. slow: as House has it."""

    service: Service
    client: LocalClient
    port: int
    run: Callable[[Any], Any]
    tokenizer: Tokenizer
    server: Any
    slow: Slow

    def channel(self, key: str | None = None) -> grpc.Channel:
        channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        return channel if key is None else grpc.intercept_channel(channel, Keyed(key))

    def settle(self) -> None:
        """Wait until nothing is open and no page is held."""
        deadline = time.monotonic() + 20
        while self.service.open_requests or self.service.stats is None or self.service.stats.held:
            assert time.monotonic() < deadline, "a request was never ended"
            time.sleep(0.01)


class Keyed(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Puts the key into the metadata of every call."""

    def __init__(self, key: str) -> None:
        self.key = key

    def _go(self, go: Any, details: Any, request: Any) -> Any:
        return go(details._replace(metadata=(("authorization", f"Bearer {self.key}"),)), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_stream = _go


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = byte_level(chat_template=TEMPLATE)
    tiny(path, vocab=len(tokenizer), max_len=192, eos=tokenizer.eos_token_id)
    tokenizer.save_pretrained(path)
    return path


@contextmanager
def opened(folder: Path, key: str | None = None, **config: Any) -> Iterator[Door]:
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(awaitable: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(awaitable, loop).result(30)

    decided = decide(load(None, SMALL | config), folder)
    tokenizer = Tokenizer.open(folder)
    client = LocalClient(partial(start, decided, lambda: tokenizer.words, queue=4))
    slow = slowed(client)

    async def begin() -> tuple[Service, Any, int]:
        service = Service(client, tokenizer, Serve(n=4, body=1 << 20), "tiny")
        return service, *await face.start_grpc(service, "127.0.0.1", 0, key)

    service, server, port = run(begin())
    try:
        yield Door(service=service, client=client, port=port, run=run, tokenizer=tokenizer, server=server, slow=slow)
    finally:
        run(server.stop(0))
        client.shutdown()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def door(folder: Path) -> Iterator[Door]:
    with opened(folder) as door:
        yield door


@pytest.fixture
def stub(door: Door) -> Iterator[Any]:
    with door.channel() as channel:
        yield rpc.RadixmeshStub(channel)
    door.settle()


def gather(chunks: Any) -> tuple[dict[int, str], dict[int, list[int]], dict[int, pb.Finish], pb.Usage]:
    """What a stream gave: texts, ids and ends by answer, and the usage, which only the last chunk has."""
    texts, ids, ends, usage = {}, {}, {}, None
    for chunk in chunks:
        assert usage is None, "something came after the usage"
        for p in chunk.pieces:
            assert p.index not in ends
            texts[p.index] = texts.get(p.index, "") + p.text
            ids.setdefault(p.index, []).extend(p.token_ids)
            if p.HasField("finish"):
                ends[p.index] = p.finish
        usage = chunk.usage if chunk.HasField("usage") else None
    assert usage is not None
    assert ends.keys() == ids.keys()
    return texts, ids, ends, usage


def fails(call: Any, code: grpc.StatusCode, field: str | None, says: str = "") -> None:
    """A call that must end with a status that names a field."""
    with pytest.raises(grpc.RpcError) as error:
        list(call) if hasattr(call, "__iter__") else call()
    assert error.value.code() is code, error.value.details()
    assert dict(error.value.trailing_metadata() or ()).get(face.FIELD) == field
    assert says in error.value.details()


def test_the_generated_code_is_what_the_proto_makes(tmp_path: Path) -> None:
    command = ["grpc_tools.protoc", f"-Iengine/serve/pb={ROOT / 'engine/serve'}"]
    outs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    done = subprocess.run(
        [sys.executable, "-m", *command, *outs, "engine/serve/pb/radixmesh.proto"], cwd=tmp_path, check=False
    )
    assert done.returncode == 0
    made = {f.name: f.read_bytes() for f in (tmp_path / "engine/serve/pb").iterdir()}
    here = {f.name: f.read_bytes() for f in (ROOT / "engine/serve/pb").glob("*_pb2*")}
    assert made == here, "run `make proto`"


def test_every_sampling_parameter_is_there() -> None:
    assert {f.name for f in pb.SamplingParams.DESCRIPTOR.fields} == set(SamplingParams.__dataclass_fields__)
    assert face.read(pb.GenerateRequest(text="a")).params == SamplingParams()


PROMPTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": ({"text": "the quick 🙂"}, {"text": "the quick 🙂"}),
    "token_ids": ({"token_ids": pb.TokenIds(ids=[5, 9, 33])}, {"ids": [5, 9, 33]}),
    "messages": (
        {"messages": pb.Messages(messages=[pb.Message(role="user", content="naïve")])},
        {"messages": [{"role": "user", "content": "naïve"}]},
    ),
}


@pytest.mark.parametrize("which", PROMPTS)
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_whole_of_the_service(door: Door, stub: Any, which: str, n: int) -> None:
    given, ask = PROMPTS[which]
    params = {"max_new_tokens": 20, "seed": 7, "temperature": 0.8, "top_k": 20, "min_p": 0.01, "ignore_eos": True}

    async def whole() -> list[Any]:
        call = await door.service.open([Ask(params=SamplingParams(**params), n=n, **ask)])
        return await call.whole()

    answers = door.run(whole())
    sampling = pb.SamplingParams(**params)
    texts, ids, ends, usage = gather(stub.Generate(pb.GenerateRequest(**given, sampling=sampling, n=n), timeout=20))
    assert [texts[i] for i in range(n)] == [a.text for a in answers]
    assert [ids[i] for i in range(n)] == [a.ids for a in answers]
    assert [ends[i].seed for i in range(n)] == [a.request.seed for a in answers]
    assert {e.reason for e in ends.values()} == {"length"}
    assert usage.prompt_tokens == len(answers[0].request.tokens)
    assert usage.completion_tokens == 20 * n


def test_a_step_is_one_message_for_all_answers(stub: Any) -> None:
    sampling = pb.SamplingParams(max_new_tokens=24, ignore_eos=True)
    chunks = list(stub.Generate(pb.GenerateRequest(text="the", n=4, sampling=sampling)))
    assert len(chunks) < 2 * 24, "as if each answer had messages of its own"
    assert max(len(c.pieces) for c in chunks) == 4


def test_stops_and_what_matched(stub: Any) -> None:
    def ask(**params: Any) -> Any:
        sampling = pb.SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True, **params)
        return gather(stub.Generate(pb.GenerateRequest(text="the", sampling=sampling)))

    text, ids, _, _ = (x[0] if isinstance(x, dict) else x for x in ask())
    stop = text[4:7]
    texts, _, ends, _ = ask(stop=[stop])
    assert (texts[0], ends[0].reason, ends[0].matched_text) == (text[: text.index(stop)], "stop", stop)
    _, got, ends, _ = ask(stop_token_ids=[ids[3]])
    assert (got[0], ends[0].matched_token_id) == (ids[: ids.index(ids[3]) + 1], ids[3])


def test_prompts_that_were_seen_are_cached(stub: Any) -> None:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(40, 80)), sampling=pb.SamplingParams(max_new_tokens=2))
    seen = [gather(stub.Generate(request))[3].cached_tokens for _ in range(2)]
    assert seen[0] == 0
    assert 0 < seen[1] < 40


def test_cancel_aborts(door: Door, stub: Any) -> None:
    reasons: list[str] = []
    door.service.finished.append(lambda record: reasons.append(record.reason))
    with door.slow(0.02):
        call = stub.Generate(pb.GenerateRequest(text="the", sampling=pb.SamplingParams(**LONG), n=2))
        next(call)
        assert door.service.open_requests
        call.cancel()
        door.settle()
    door.service.finished.clear()
    assert reasons == ["abort", "abort"]


def test_a_channel_that_is_closed_aborts(door: Door) -> None:
    with door.channel() as channel:
        call = rpc.RadixmeshStub(channel).Generate(
            pb.GenerateRequest(text="a", sampling=pb.SamplingParams(**LONG), n=4)
        )
        next(call)
    door.settle()


def test_a_deadline_aborts(door: Door, stub: Any) -> None:
    reasons: list[str] = []
    door.service.finished.append(lambda record: reasons.append(record.reason))
    request = pb.GenerateRequest(text="the", sampling=pb.SamplingParams(**LONG), n=4)
    fails(stub.Generate(request, timeout=0.05), grpc.StatusCode.DEADLINE_EXCEEDED, None)
    door.settle()
    door.service.finished.clear()
    assert set(reasons) <= {"abort", "length"}


def test_abort_by_id(door: Door, stub: Any) -> None:
    request = pb.GenerateRequest(text="the", sampling=pb.SamplingParams(**LONG), n=2, request_id="mine")
    with door.slow(0.02):
        call = stub.Generate(request)
        first = next(call)
        assert first.request_id == "mine"
        fails(stub.Generate(request.__class__(text="a", request_id="mine-0")), INVALID, "request_id")
        assert stub.Abort(pb.AbortRequest(request_id="mine")).aborted == 2
    _, _, ends, _ = gather([first, *call])
    assert {e.reason for e in ends.values()} == {"abort"}
    assert stub.Abort(pb.AbortRequest(request_id="mine")).aborted == 0
    fails(lambda: stub.Abort(pb.AbortRequest()), INVALID, "request_id")


INVALID = grpc.StatusCode.INVALID_ARGUMENT
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({}, "prompt"),
    "empty text": ({"text": ""}, "text"),
    "no ids": ({"token_ids": pb.TokenIds()}, "token_ids"),
    "negative id": ({"token_ids": pb.TokenIds(ids=[1, -1])}, "token_ids"),
    "unknown id": ({"token_ids": pb.TokenIds(ids=[1 << 40])}, "token_ids"),
    "too long": ({"token_ids": pb.TokenIds(ids=[1] * 200)}, "token_ids"),
    "long text": ({"text": "x y" * 3000}, "text"),
    "no messages": ({"messages": pb.Messages()}, "messages"),
    "no role": ({"messages": pb.Messages(messages=[pb.Message(content="a")])}, "messages.0.role"),
    "n of 0": ({"text": "a", "n": 0}, "n"),
    "huge n": ({"text": "a", "n": 1 << 60}, "n"),
    "long id": ({"text": "a", "request_id": "x" * 129}, "request_id"),
    "odd id": ({"text": "a", "request_id": "a\nb"}, "request_id"),
    **{
        f"{name}={value}": ({"text": "a", "sampling": pb.SamplingParams(**{name: value})}, name)
        for name, value in [
            ("temperature", float("nan")),
            ("temperature", float("inf")),
            ("temperature", -1),
            ("top_p", 0),
            ("top_k", -2),
            ("min_p", 2),
            ("max_new_tokens", -1),
            ("max_new_tokens", -(1 << 60)),
            ("repetition_penalty", float("-inf")),
            ("presence_penalty", 3),
            ("frequency_penalty", float("nan")),
            ("stop_token_ids", [1 << 20]),
            ("stop_token_ids", [-5]),
            ("stop", [""]),
            ("min_new_tokens", -1),
            ("min_new_tokens", 200),
            ("logit_bias", {5: float("nan")}),
            ("logit_bias", {5: 1000.0}),
            ("logit_bias", {1 << 20: 1.0}),
            ("logit_bias", {-1: 1.0}),
            ("allowed_token_ids", [-1]),
            ("allowed_token_ids", [1 << 20]),
            ("bad_words", [""]),
            ("logprobs", 21),
            ("prompt_logprobs", -1),
            ("logprob_start_len", 1),
        ]
    },
    "long salt": ({"text": "a", "cache_salt": "x" * 1025}, "cache_salt"),
    "start past the prompt": (
        {"text": "a", "sampling": pb.SamplingParams(prompt_logprobs=0, logprob_start_len=50)},
        "logprob_start_len",
    ),
    "100 stop strings": ({"text": "a", "sampling": pb.SamplingParams(stop=["x"] * 100)}, "stop"),
}


@pytest.mark.parametrize("which", BAD)
def test_bad_input_names_the_field_and_the_server_goes_on(stub: Any, which: str) -> None:
    given, field = BAD[which]
    fails(stub.Generate(pb.GenerateRequest(**given), timeout=20), INVALID, field)
    assert gather(stub.Generate(pb.GenerateRequest(text="a", sampling=pb.SamplingParams(max_new_tokens=1))))


def test_other_refusals(door: Door, stub: Any) -> None:
    fails(stub.Generate(pb.GenerateRequest(text="a", model="other")), grpc.StatusCode.NOT_FOUND, "model", "tiny")
    fails(stub.Generate(pb.GenerateRequest(text="x" * (2 << 20))), grpc.StatusCode.RESOURCE_EXHAUSTED, None)
    unknown = pb.GenerateRequest.FromString(pb.GenerateRequest(text="a").SerializeToString() + b"\x98\x06\x01")
    fails(stub.Generate(unknown), INVALID, "request", "field 99")
    with door.channel() as channel:
        raw = channel.unary_stream("/radixmesh.v1.Radixmesh/Generate")
        with pytest.raises(grpc.RpcError):
            list(raw(b"\xff\xff\xff"))
        fails(partial(channel.unary_unary("/radixmesh.v1.Radixmesh/Nothing"), b""), UNIMPLEMENTED, None)
    assert [m.name for m in stub.ListModels(pb.ListModelsRequest()).models] == ["tiny"]


UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED


def test_a_full_queue_is_resource_exhausted(door: Door, stub: Any) -> None:
    """4 slots and 4 places in the queue."""
    request = pb.GenerateRequest(text="the", sampling=pb.SamplingParams(**LONG), n=3)
    calls = [stub.Generate(request) for _ in range(6)]
    codes = []
    for call in calls:
        try:
            gather(call)
        except grpc.RpcError as error:
            codes.append(error.code())
    assert codes
    assert set(codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED}


def described(channel: grpc.Channel) -> tuple[list[str], descriptor_pool.DescriptorPool]:
    """What reflection tells, as grpcurl asks for it: names of services, and their descriptors."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = reflection_pb2.ServerReflectionRequest
    (listed,) = stub.ServerReflectionInfo(iter([asked(list_services="")]))
    names = [s.name for s in listed.list_services_response.service]
    pool = descriptor_pool.DescriptorPool()
    for answer in stub.ServerReflectionInfo(asked(file_containing_symbol=n) for n in names):
        for file in answer.file_descriptor_response.file_descriptor_proto:
            pool.Add(descriptor_pb2.FileDescriptorProto.FromString(file))
    return names, pool


def test_as_grpcurl_does(door: Door) -> None:
    """From nothing but the address: list, describe, call."""
    with door.channel() as channel:
        names, pool = described(channel)
        assert set(names) == {
            "radixmesh.v1.Radixmesh",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        method = pool.FindServiceByName("radixmesh.v1.Radixmesh").FindMethodByName("Generate")
        ask, chunk = (message_factory.GetMessageClass(t) for t in (method.input_type, method.output_type))
        call = channel.unary_stream("/radixmesh.v1.Radixmesh/Generate", ask.SerializeToString, chunk.FromString)
        chunks = list(call(ask(text="the dog", sampling={"max_new_tokens": 5, "ignore_eos": True}), timeout=20))
    assert sum(len(p.token_ids) for c in chunks for p in c.pieces) == 5


def test_every_rpc_wants_the_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: set[str] = set()
    kind = grpc.aio._server.Server  # what grpc.aio.server makes
    add = kind.add_generic_rpc_handlers

    def spy(self: Any, handlers: Any) -> None:
        registered.update(h.service_name() for h in handlers)
        add(self, handlers)

    monkeypatch.setattr(kind, "add_generic_rpc_handlers", spy)
    with opened(folder, KEY) as door, door.channel(KEY) as keyed:
        names, pool = described(keyed)
        assert set(names) == registered, "a service that is not told of"
        methods = [m for n in names for m in pool.FindServiceByName(n).methods]
        assert len(methods) >= 6
        for key in (None, "", "sesam", "sesame2", "SESAME"):
            with door.channel() as channel:
                metadata = () if key is None else (("authorization", f"Bearer {key}".encode().decode("latin-1")),)
                for path in [*(f"/{m.containing_service.full_name}/{m.name}" for m in methods), "/a.b.C/D", "/grpc"]:
                    code = probe(channel, path, metadata)
                    open_ = path.startswith("/grpc.health.v1.Health/")
                    assert (code is not grpc.StatusCode.UNAUTHENTICATED) == open_, (path, key)
        assert gather(rpc.RadixmeshStub(keyed).Generate(pb.GenerateRequest(text="a", sampling=pb.SamplingParams())))
        twice = (("authorization", f"Bearer {KEY}"), ("authorization", "Bearer x"))
        with door.channel() as channel:
            assert probe(channel, "/radixmesh.v1.Radixmesh/ListModels", twice) is grpc.StatusCode.UNAUTHENTICATED


def probe(channel: grpc.Channel, path: str, metadata: Any) -> grpc.StatusCode:
    """The status that a call of anything ends with; OK when it gives something."""
    call = channel.stream_stream(path)(iter([b""]), metadata=metadata, timeout=5)
    try:
        next(call, None)
    except grpc.RpcError as error:
        return error.code()
    call.cancel()
    return grpc.StatusCode.OK


def test_health_follows_the_service(folder: Path) -> None:
    with opened(folder) as door, door.channel() as channel:
        stub, ask = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest
        for name in ("", "radixmesh.v1.Radixmesh"):
            assert stub.Check(ask(service=name)).status == health_pb2.HealthCheckResponse.SERVING
        fails(lambda: stub.Check(ask(service="a.b")), grpc.StatusCode.NOT_FOUND, None)
        unknown = stub.Watch(ask(service="a.b"))
        assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        unknown.cancel()
        watch = stub.Watch(ask(), timeout=20)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        generate = rpc.RadixmeshStub(channel).Generate
        with door.slow(0.02):
            open_ = generate(pb.GenerateRequest(text="the", sampling=pb.SamplingParams(**LONG)))
            next(open_)
            door.client.shutdown()
        fails(open_, grpc.StatusCode.UNAVAILABLE, None)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        fails(generate(pb.GenerateRequest(text="a")), grpc.StatusCode.UNAVAILABLE, None)
        assert isinstance(door.service.lost, BackendLost)


def test_a_clean_stop_ends_what_is_open(folder: Path) -> None:
    with opened(folder) as door, door.channel() as channel, door.slow(0.02):
        call = rpc.RadixmeshStub(channel).Generate(
            pb.GenerateRequest(text="the", sampling=pb.SamplingParams(**LONG), n=4)
        )
        next(call)
        began = time.monotonic()
        door.run(door.server.stop(0.01))
        assert time.monotonic() - began < 10
        with pytest.raises(grpc.RpcError):
            gather(call)
        door.settle()


def test_a_port_in_use_is_one_line(door: Door) -> None:
    with pytest.raises(ConfigError, match=r"grpc_port: can't listen on 127.0.0.1") as error:
        door.run(face.start_grpc(door.service, "127.0.0.1", door.port, None))
    assert error.value.field == "serve.grpc_port"
