"""The gRPC face: radixmesh.v1 of radixmesh.proto, grpc.health.v1 and reflection, on the event loop of the service."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.errors import ConfigError, InvalidRequest, RadixmeshError
from engine.run.answer import Answer
from engine.sampling import SamplingParams
from engine.sched.admission import MAX_TIMEOUT
from engine.sched.scores import Score
from engine.serve.call import Piece
from engine.serve.pb import radixmesh_pb2 as pb
from engine.serve.pb import radixmesh_pb2_grpc as rpc
from engine.serve.service import Ask, Service, salted

NAME = str(pb.DESCRIPTOR.services_by_name["Radixmesh"].full_name)
OPEN = (f"/{health.SERVICE_NAME}/",)
"""What needs no key: RPCs whose path begins so. All else does, known or not."""
ROUTE = f"/{NAME}/Generate"
FIELD = "radixmesh-field"
"""Trailing metadata: the field at fault."""
MAX_ID = 128
MAX_DETAILS = 1000
WATCH_SECONDS = 0.25
LEAST_SECONDS = 1e-3


async def start_grpc(service: Service, host: str, port: int, api_key: str | None = None) -> tuple[grpc.aio.Server, int]:
    """Serve on the running event loop. Gives the server and the port that it got (0 asks for any).

    `await server.stop(grace)` takes no more calls, waits so many seconds for the open ones and cancels the rest, which
    aborts their requests. api_key: wanted as the metadata "authorization: Bearer KEY" of every RPC but those of OPEN.
    Raises ConfigError when the port can't be had.
    """
    server = grpc.aio.server(
        interceptors=[] if api_key is None else [Gate(api_key)],
        options=[
            ("grpc.max_receive_message_length", service.config.body),
            ("grpc.so_reuseport", 0),  # a port in use is an error
            ("grpc.keepalive_time_ms", 60_000),  # clients that are gone without a word
        ],
    )
    rpc.add_RadixmeshServicer_to_server(Inference(service), server)
    health_pb2_grpc.add_HealthServicer_to_server(Health(service), server)
    reflection.enable_server_reflection((NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        got = server.add_insecure_port(where)
    except RuntimeError:
        got = 0
    if not got:
        raise ConfigError(f"grpc_port: can't listen on {where}; free it or choose another", field="serve.grpc_port")
    await server.start()
    return server, got


class Inference:
    """radixmesh.v1.Radixmesh over a Service."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        """Writes to the stream itself: when the client goes, what it waits for is cancelled, and the call is closed."""
        try:
            if request.model and request.model != self.service.name:
                await _end(context, grpc.StatusCode.NOT_FOUND, f"model: {self.service.name} is served here", "model")
            ask = replace(read(request), timeout=_left(context))
            call = await self.service.open([ask], request.request_id, ROUTE)
        except RadixmeshError as error:
            await refuse(context, error)
        left, name = len(call.answers), call.id
        try:
            async for batch in call.pieces():
                left -= sum(p.finish is not None for p in batch)
                usage = None if left else _usage(call.answers)
                await context.write(pb.GenerateChunk(pieces=_pieces(batch, call.answers), request_id=name, usage=usage))
                name = ""
            if call.expired:  # whether the client's clock or ours is first: a call past its deadline ends as one
                await _end(context, grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline of the call passed", None)
        except RadixmeshError as error:
            await refuse(context, error)
        finally:
            call.close()

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortReply:
        """An empty id ends nothing: it is more often forgotten than meant."""
        if not request.request_id:
            await refuse(context, InvalidRequest("request_id: is empty; name a request", field="request_id"))
        return pb.AbortReply(aborted=self.service.abort(request.request_id))

    async def UpdateWeights(self, request: pb.UpdateWeightsRequest, context: Any) -> pb.UpdateWeightsReply:
        """Other weights of the same model."""
        try:
            return pb.UpdateWeightsReply(weight_version=await self.service.update(request.path))
        except RadixmeshError as error:
            await refuse(context, error)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsReply:
        """The one model."""
        info = self.service.info
        model = pb.Model(
            name=self.service.name,
            architecture=info.architecture,
            max_len=info.room,
            vocab=info.limits.vocab,
            weight_version=self.service.version,
        )
        return pb.ListModelsReply(models=[model])


class Health:
    """grpc.health.v1.Health: SERVING while a request would be taken."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def Check(self, request: Any, context: Any) -> Any:
        """Of the server ("") or of one of its services."""
        if not self._known(request.service):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service: there is no {request.service[:MAX_DETAILS]}")
        return self._now()

    async def Watch(self, request: Any, context: Any) -> None:
        """The same, at once and whenever it changes."""
        if not self._known(request.service):
            await context.write(_health("SERVICE_UNKNOWN"))
            while True:  # as the protocol has it: the service may come later. Ends with the client.
                await asyncio.sleep(3600)
        told = None
        while True:
            now = self._now()
            if now != told:
                await context.write(now)
                told = now
            await asyncio.sleep(WATCH_SECONDS)

    def _known(self, name: str) -> bool:
        return name in ("", NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)

    def _now(self) -> Any:
        return _health("SERVING" if self.service.ready else "NOT_SERVING")


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses every RPC without the key, but for OPEN."""

    def __init__(self, key: str) -> None:
        self._wanted = f"Bearer {key}".encode()
        # A handler of streams is called before the request is read.
        self._refusal = grpc.stream_stream_rpc_method_handler(self._refuse)

    async def intercept_service(self, go: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """The handler of an RPC, or what refuses it."""
        if details.method.startswith(OPEN) or self._has_key(details.invocation_metadata):
            return await go(details)
        return self._refusal

    def _has_key(self, metadata: Sequence[tuple[str, str | bytes]]) -> bool:
        given = [value for key, value in metadata or () if key == "authorization"]
        if len(given) != 1:
            return False
        value = given[0].encode() if isinstance(given[0], str) else given[0]
        return hmac.compare_digest(value, self._wanted)

    async def _refuse(self, requests: Any, context: Any) -> None:
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED, 'a key is wanted here: metadata "authorization: Bearer KEY"'
        )


def read(request: pb.GenerateRequest) -> Ask:
    """What a message asks. Raises InvalidRequest naming the field."""
    _known(request, "request")
    _known(request.sampling, "sampling")
    if request.request_id and not (
        len(request.request_id) <= MAX_ID and request.request_id.isascii() and request.request_id.isprintable()
    ):
        raise InvalidRequest(f"request_id: must be at most {MAX_ID} printable ASCII characters", field="request_id")
    given = {
        field.name: dict(value) if field.name == "logit_bias" else list(value) if field.is_repeated else value
        for field, value in request.sampling.ListFields()
    }
    which = request.WhichOneof("prompt")
    if which is None:
        raise InvalidRequest("prompt: is missing; give text, token_ids or messages", field="prompt")
    if which == "text" and not request.text:
        raise InvalidRequest("text: is empty", field="text")
    return Ask(
        params=SamplingParams.of(given),
        text=request.text if which == "text" else None,
        ids=_ids(request.token_ids) if which == "token_ids" else None,
        messages=_messages(request.messages) if which == "messages" else None,
        n=request.n if request.HasField("n") else 1,
        priority=request.priority,
        namespace=salted(request.cache_salt),
        field=which,
    )


def _left(context: Any) -> float | None:
    """Seconds until the deadline of an RPC, None where it has none or a far one; one that has passed is about to end
    it."""
    left = context.time_remaining()
    return None if left is None or left > MAX_TIMEOUT else max(left, LEAST_SECONDS)


def _ids(given: pb.TokenIds) -> list[int]:
    _known(given, "token_ids")
    return list(given.ids)


def _messages(given: pb.Messages) -> list[dict[str, str]]:
    _known(given, "messages")
    for i, message in enumerate(given.messages):
        _known(message, f"messages.{i}")
        if not message.role:
            raise InvalidRequest(f"messages.{i}: has no role", field=f"messages.{i}.role")
    return [{"role": m.role, "content": m.content} for m in given.messages]


def _known(message: Any, name: str) -> None:
    """A field is honoured or refused, never ignored."""
    for field in UnknownFieldSet(message):
        raise InvalidRequest(f"{name}: field {field.field_number} is not known here", field=name)


def _pieces(batch: Sequence[Piece], answers: Sequence[Answer]) -> list[pb.Piece]:
    """One for each answer that has news, though several steps may have passed while the client was slow."""
    made: dict[int, pb.Piece] = {}
    for piece in batch:
        answer = answers[piece.index]
        if piece.index in made:
            made[piece.index].text += piece.text
            made[piece.index].token_ids.extend(piece.tokens)
        else:
            made[piece.index] = pb.Piece(index=piece.index, text=piece.text, token_ids=piece.tokens)
        made[piece.index].logprobs.extend(map(_logprob, piece.tokens, piece.scores))
        if piece.first:
            made[piece.index].prompt_logprobs.extend(map(_logprob, answer.prompt_ids, (None, *piece.prompt_scores)))
        if piece.finish is not None:
            seed, matched = answer.request.seed, piece.finish.matched
            text = matched if isinstance(matched, str) else None
            token = matched if isinstance(matched, int) else None
            made[piece.index].finish.CopyFrom(
                pb.Finish(
                    reason=piece.finish.kind,
                    matched_text=text,
                    matched_token_id=token,
                    seed=seed,
                    weight_version=answer.version,
                )
            )
    return list(made.values())


def _logprob(token: int, score: Score | None) -> pb.TokenLogprob:
    """One token's; the first of a prompt has none."""
    if score is None:
        return pb.TokenLogprob(token_id=token)
    top = [pb.Alternative(token_id=t, logprob=p) for t, p in score.top]
    return pb.TokenLogprob(token_id=token, logprob=score.own, top=top)


def _usage(answers: Sequence[Answer]) -> pb.Usage:
    """The prompt counts once, however many answers there are."""
    first = answers[0]
    return pb.Usage(
        prompt_tokens=len(first.request.tokens),
        completion_tokens=sum(len(a.ids) for a in answers),
        cached_tokens=first.cached,
    )


def _health(name: str) -> Any:
    return health_pb2.HealthCheckResponse(status=name)


async def refuse(context: Any, error: RadixmeshError) -> NoReturn:
    """End an RPC with an error's status, its text, and the field at fault."""
    field = "request_id" if error.field == "rid" else error.field
    await _end(context, grpc.StatusCode[error.grpc], str(error), field)


async def _end(context: Any, code: grpc.StatusCode, details: str, field: str | None) -> NoReturn:
    metadata = () if field is None else ((FIELD, field),)
    await context.abort(code, details[:MAX_DETAILS], metadata)
    raise AssertionError("abort raises")
