"""OpenAI's forms: chat and plain completions, whole or as events, and the models."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidRequest
from engine.run.answer import Answer
from engine.sampling import SamplingParams
from engine.serve.exchange import ENCODER, Exchange, NotFound
from engine.serve.reading import convert
from engine.serve.schemas import (
    CHAT,
    COMPLETION,
    STREAM_OPTIONS,
    Chat,
    Completion,
    Sampled,
    StreamOptions,
    messages,
    prompts,
)
from engine.serve.service import Ask, Call, Piece, Service

if TYPE_CHECKING:
    from engine.serve.http import Face

SEEDS = 1 << 64
COMPLETION_TOKENS = 16
"""max_tokens of a plain completion that does not say, as OpenAI has it."""
DONE = b"data: [DONE]\n\n"


async def chat(x: Exchange) -> None:
    """POST /v1/chat/completions."""
    form = x.read(Chat, CHAT)
    x.served(form.model)
    given = messages(form, x.face.metrics.unknown)
    if form.max_tokens is not None and form.max_completion_tokens not in (None, form.max_tokens):
        raise InvalidRequest("max_tokens: differs from max_completion_tokens; give one", field="max_tokens")
    name = "max_tokens" if form.max_completion_tokens is None else "max_completion_tokens"
    most = getattr(form, name)
    params = sampling(form, x.face.service.info.room if most is None else _most(name, most))
    asks = [
        Ask(params=params, messages=given, n=_n(form), priority=form.priority or 0, namespace=_salt(form),
            field="messages")
    ]  # fmt: skip
    last = told(x, form)
    call = await x.face.open(x, asks, form.rid)
    frames = Frames(x.face, "chat.completion", f"chatcmpl-{call.id}", last)
    try:
        if form.stream:
            opening = [frames.raw(i, ',"delta":{"role":"assistant","content":""}') for i in range(len(call.answers))]
            await _stream(x, call, frames, asks, opening)
        else:
            await call.whole()
            message = ({"role": "assistant", "content": a.text, "refusal": None} for a in call.answers)
            await _whole(x, call, frames, asks, [{"message": m} for m in message])
    finally:
        call.close()


async def completions(x: Exchange) -> None:
    """POST /v1/completions."""
    form = x.read(Completion, COMPLETION)
    x.served(form.model)
    n = _n(form)
    if form.best_of is not None and form.best_of != n:
        raise InvalidRequest("best_of: is not supported here; leave it out, or n of them", field="best_of")
    most = COMPLETION_TOKENS if form.max_tokens is None else _most("max_tokens", form.max_tokens)
    params = sampling(form, most)
    given, _ = prompts(form.prompt, "prompt")
    asks = [
        Ask(params=params, text=p if isinstance(p, str) else None, ids=None if isinstance(p, str) else p, n=n,
            priority=form.priority or 0, namespace=_salt(form))
        for p in given
    ]  # fmt: skip
    last = told(x, form)
    call = await x.face.open(x, asks, form.rid)
    frames = Frames(x.face, "text_completion", f"cmpl-{call.id}", last)
    try:
        echoes = _echoes(x.face.service, asks, params) if form.echo else [""] * len(call.answers)
        if form.stream:
            opening = [frames.text(i, echo) for i, echo in enumerate(echoes) if echo]
            await _stream(x, call, frames, asks, opening)
        else:
            await call.whole()
            texts = [{"text": echo + a.text} for echo, a in zip(echoes, call.answers, strict=True)]
            await _whole(x, call, frames, asks, texts)
    finally:
        call.close()


async def models(x: Exchange) -> None:
    """GET /v1/models."""
    await x.json({"object": "list", "data": [_model(x.face.service)]})


async def model(x: Exchange) -> None:
    """GET /v1/models/{id}."""
    service, name = x.face.service, x.scope["path_params"]["id"]
    if name not in (service.name, service.info.path):
        raise NotFound(f"model: {name[:200]!r} is not served here", field="model", code="model_not_found")
    await x.json(_model(service))


def sampling(form: Sampled, most: int) -> SamplingParams:
    """OpenAI's names and defaults as the engine's. most: tokens to be made. Raises InvalidRequest naming the field."""
    stop = form.stop
    given: Mapping[str, Any] = {
        "max_new_tokens": most,
        "temperature": form.temperature,
        "top_p": form.top_p,
        "top_k": form.top_k,
        "min_p": form.min_p,
        "seed": _seed(form.seed),
        "stop": () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
        "stop_token_ids": None if form.stop_token_ids is None else tuple(form.stop_token_ids),
        "ignore_eos": form.ignore_eos,
        "skip_special_tokens": form.skip_special_tokens,
        "no_stop_trim": form.no_stop_trim or form.include_stop_str_in_output,
        "repetition_penalty": form.repetition_penalty,
        "presence_penalty": form.presence_penalty,
        "frequency_penalty": form.frequency_penalty,
    }
    return SamplingParams(**{k: v for k, v in given.items() if v is not None})


def told(x: Exchange, form: Sampled) -> bool:
    """Whether a stream ends with its usage. Raises InvalidRequest."""
    if form.stream_options is None:
        return False
    if not form.stream:
        raise InvalidRequest("stream_options: is only for stream: true", field="stream_options")
    name = "stream_options"
    return bool(convert(form.stream_options, StreamOptions, name, STREAM_OPTIONS, x.face.metrics.unknown).include_usage)


def usage(call: Call, asks: Sequence[Ask]) -> dict[str, Any]:
    """What was used: a prompt counts once, however many answers it has."""
    firsts, at = [], 0
    for ask in asks:
        firsts.append(call.answers[at])
        at += ask.n
    prompt, made = sum(len(a.request.tokens) for a in firsts), sum(len(a.ids) for a in call.answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(a.cached for a in firsts)},
    }


class Frames:
    """The events of one stream: all that does not change is made once.

    kind: object of a whole answer. last: an event with the usage ends the stream, so it is null in the others.
    """

    def __init__(self, face: Face, kind: str, name: str, last: bool) -> None:
        self.last = last
        self.head: dict[str, Any] = {
            "id": name,
            "object": kind,
            "created": int(time.time()),
            "model": face.service.name,
            "system_fingerprint": face.fingerprint,
        }
        chat = kind == "chat.completion"
        event = self.head | ({"object": "chat.completion.chunk"} if chat else {})
        self._event = b"data: " + ENCODER.encode(event)[:-1]
        self._start = self._event + b',"choices":[{"index":'
        self._before, self._after = (b',"delta":{"content":', b"}") if chat else (b',"text":', b"")
        self._empty = b',"delta":{}' if chat else b',"text":""'
        self._close = b"}]" + (b',"usage":null' if last else b"") + b"}\n\n"
        self._open = b',"logprobs":null,"finish_reason":null' + self._close
        self._after += self._open
        self._heads: dict[int, bytes] = {}

    def text(self, index: int, text: str) -> bytes:
        """New text of an answer."""
        head = self._heads.get(index)
        if head is None:
            head = self._heads[index] = self._start + str(index).encode() + self._before
        return head + ENCODER.encode(text) + self._after

    def raw(self, index: int, body: str) -> bytes:
        """A choice with this in it."""
        return self._start + str(index).encode() + body.encode() + self._open

    def finish(self, index: int, reason: str) -> bytes:
        """The end of an answer."""
        end = b',"logprobs":null,"finish_reason":"' + reason.encode() + b'"' + self._close
        return self._start + str(index).encode() + self._empty + end

    def usage(self, used: dict[str, Any]) -> bytes:
        """The event after all answers."""
        return self._event + b',"choices":[],"usage":' + ENCODER.encode(used) + b"}\n\n"


async def _stream(x: Exchange, call: Call, frames: Frames, asks: Sequence[Ask], opening: list[bytes]) -> None:
    """The events of a call: one write for each step that shows anything."""
    await x.begin()
    out = opening
    async for batch in call.pieces():
        for piece in batch if len(batch) <= len(call.answers) else merge(batch):
            if piece.text:
                out.append(frames.text(piece.index, piece.text))
            if piece.finish is not None:
                out.append(frames.finish(piece.index, piece.finish.kind))
        if out:
            await x.write(b"".join(out))
            out = []
    if frames.last:
        out.append(frames.usage(usage(call, asks)))
    await x.end(b"".join(out) + DONE)


async def _whole(
    x: Exchange, call: Call, frames: Frames, asks: Sequence[Ask], shown: Iterable[Mapping[str, Any]]
) -> None:
    choices = [
        {"index": i, **choice, "logprobs": None, "finish_reason": _reason(answer)}
        for i, (choice, answer) in enumerate(zip(shown, call.answers, strict=True))
    ]
    await x.json(frames.head | {"choices": choices, "usage": usage(call, asks)})


def merge(batch: Sequence[Piece]) -> list[Piece]:
    """One piece for each answer that has news, though several steps passed while the client was slow."""
    made: dict[int, Piece] = {}
    for piece in batch:
        before = made.get(piece.index)
        made[piece.index] = (
            piece
            if before is None
            else Piece(
                index=piece.index,
                text=before.text + piece.text,
                tokens=before.tokens + piece.tokens,
                finish=piece.finish,
            )
        )
    return list(made.values())


def fingerprint(service: Service) -> str:
    """The same for as long as model, backend and what was decided are the same."""
    info = service.info
    decided = [(d.field, str(d.value)) for d in info.decisions]
    text = repr((info.path, info.architecture, info.backend, info.status.device, info.status.version, decided))
    return f"fp_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _echoes(service: Service, asks: Sequence[Ask], params: SamplingParams) -> list[str]:
    """The prompt of each answer."""
    out = []
    for ask in asks:
        text = service.decode(ask.ids or (), not params.skip_special_tokens) if ask.text is None else ask.text
        out += [text] * ask.n
    return out


def _reason(answer: Answer) -> str | None:
    return None if answer.finish is None else answer.finish.kind


def _most(name: str, value: int) -> int:
    if not 1 <= value < 1 << 31:
        raise InvalidRequest(f"{name}: must be between 1 and {(1 << 31) - 1}, not {value}", field=name)
    return value


def _n(form: Sampled) -> int:
    return 1 if form.n is None else form.n


def _seed(seed: int | None) -> int | None:
    """OpenAI's seeds are signed."""
    return seed % SEEDS if seed is not None and -SEEDS // 2 <= seed < 0 else seed


def _salt(form: Sampled) -> tuple[str, ...]:
    return (form.cache_salt,) if form.cache_salt else ()


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "radixmesh",
        "root": service.info.path,
        "max_model_len": service.info.room,
    }
