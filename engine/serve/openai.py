"""OpenAI's forms: chat and plain completions, whole or as events, and the models."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidRequest
from engine.run.answer import Answer
from engine.sampling import SamplingParams, biases
from engine.serve.call import Call, Piece
from engine.serve.exchange import ENCODER, Exchange, NotFound
from engine.serve.reading import convert, renamed
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
from engine.serve.scores import Plain, Shown, Spoken, prompt_logprobs
from engine.serve.service import Ask, Service, salted

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
    if form.top_logprobs and not form.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs: true", field="top_logprobs")
    params, names = sampling(
        form,
        x.face.service.info.room if most is None else _most(name, most),
        {"max_new_tokens": name, "logprobs": "top_logprobs" if form.top_logprobs else "logprobs"},
        logprobs=(form.top_logprobs or 0) if form.logprobs else None,
    )
    asks = [
        Ask(params=params, messages=given, n=_n(form), priority=form.priority or 0, namespace=salted(form.cache_salt),
            timeout=form.timeout, field="messages", names=names)
    ]  # fmt: skip
    last = told(x, form)
    call = await x.face.open(x, asks, form.rid)
    frames = Frames(x.face, "chat.completion", f"chatcmpl-{call.id}", last)
    shown = Spoken(x.face.service.tokenizer) if form.logprobs else None
    try:
        if form.stream:
            opening = [frames.raw(i, ',"delta":{"role":"assistant","content":""}') for i in range(len(call.answers))]
            await _stream(x, call, frames, asks, opening, shown)
            return
        choices = [
            {
                "message": {"role": "assistant", "content": a.text, "refusal": None},
                "logprobs": shown and shown.whole(a.ids, a.scores),
                "finish_reason": _reason(a),
            }
            for a in await call.whole()
        ]
        more = {}
        if form.prompt_logprobs is not None:
            more["prompt_logprobs"] = prompt_logprobs(x.face.service.tokenizer, call.answers[0])
        await _whole(x, frames, choices, usage(call, asks), more)
    finally:
        call.close()


async def completions(x: Exchange) -> None:
    """POST /v1/completions."""
    form = x.read(Completion, COMPLETION)
    x.served(form.model)
    most = COMPLETION_TOKENS if form.max_tokens is None else _most("max_tokens", form.max_tokens, 0)
    n, best_of = _n(form), _best_of(form, most)
    scored = form.echo and form.logprobs is not None and form.prompt_logprobs is None
    params, names = sampling(
        form,
        most,
        {
            "n": "n" if best_of == n else "best_of",
            "max_new_tokens": "max_tokens",
            "logprobs": "best_of" if form.logprobs is None else "logprobs",
            "prompt_logprobs": "logprobs" if scored else "prompt_logprobs",
        },
        logprobs=0 if form.logprobs is None and best_of > n else form.logprobs,
        prompt_logprobs=form.logprobs if scored else form.prompt_logprobs,
    )
    given, _ = prompts(form.prompt, "prompt")
    asks = [
        Ask(params=params, text=p if isinstance(p, str) else None, ids=None if isinstance(p, str) else p, n=best_of,
            priority=form.priority or 0, namespace=salted(form.cache_salt), timeout=form.timeout, names=names)
        for p in given
    ]  # fmt: skip
    last = told(x, form)
    call = await x.face.open(x, asks, form.rid)
    frames = Frames(x.face, "text_completion", f"cmpl-{call.id}", last)
    service = x.face.service
    try:
        echoes = _echoes(service, asks, params) if form.echo else [""] * len(call.answers)
        shown = None
        if form.logprobs is not None:
            shown = Plain(service.tokenizer, call.answers, echoes if form.echo else None)
        if form.stream:
            opening = [frames.text(i, echo) for i, echo in enumerate(echoes) if echo and shown is None]
            await _stream(x, call, frames, asks, opening, shown)
            return
        answers = await call.whole()
        choices = []
        for i in [i for first in range(0, len(answers), best_of) for i in _best(answers, first, best_of, n)]:
            choice: dict[str, Any] = {
                "text": echoes[i] + answers[i].text,
                "logprobs": shown and shown.whole(i, answers[i]),
            }
            if form.prompt_logprobs is not None:
                choice["prompt_logprobs"] = prompt_logprobs(service.tokenizer, answers[i])
            choices.append(choice | {"finish_reason": _reason(answers[i])})
        await _whole(x, frames, choices, usage(call, asks))
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


def sampling(
    form: Sampled,
    most: int,
    names: Mapping[str, str],
    *,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> tuple[SamplingParams, Mapping[str, str]]:
    """OpenAI's names and defaults as the engine's, and the engine's names as this request has them. most: tokens to be
    made. Raises InvalidRequest naming the field."""
    stop, fewest = form.stop, form.min_new_tokens if form.min_tokens is None else form.min_tokens
    if form.min_new_tokens not in (None, fewest):
        raise InvalidRequest("min_tokens: differs from min_new_tokens; give one", field="min_tokens")
    if form.prompt_logprobs is not None and form.stream:
        raise InvalidRequest("prompt_logprobs: is not for stream: true", field="prompt_logprobs")
    words = form.bad_words
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
        "min_new_tokens": fewest,
        "logit_bias": None if form.logit_bias is None else biases(form.logit_bias),
        "allowed_token_ids": None if form.allowed_token_ids is None else tuple(form.allowed_token_ids),
        "bad_words": () if words is None else (words,) if isinstance(words, str) else tuple(words),
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs if form.prompt_logprobs is None else form.prompt_logprobs,
    }
    names = {**names, **({} if form.min_tokens is None else {"min_new_tokens": "min_tokens"})}
    with renamed(names):
        return SamplingParams(**{k: v for k, v in given.items() if v is not None}), names


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
        self._before, self._inner = (b',"delta":{"content":', b"}") if chat else (b',"text":', b"")
        self._empty = b',"delta":{}' if chat else b',"text":""'
        self._close = b"}]" + (b',"usage":null' if last else b"") + b"}\n\n"
        self._open = b',"logprobs":null,"finish_reason":null' + self._close
        self._after = self._inner + self._open
        self._heads: dict[int, bytes] = {}

    def text(self, index: int, text: str, logprobs: Any = None) -> bytes:
        """New text of an answer, and the logprobs of its tokens."""
        head = self._heads.get(index)
        if head is None:
            head = self._heads[index] = self._start + str(index).encode() + self._before
        if logprobs is None:
            return head + ENCODER.encode(text) + self._after
        told = b',"logprobs":' + ENCODER.encode(logprobs) + b',"finish_reason":null'
        return head + ENCODER.encode(text) + self._inner + told + self._close

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


async def _stream(
    x: Exchange, call: Call, frames: Frames, asks: Sequence[Ask], opening: list[bytes], shown: Shown | None
) -> None:
    """The events of a call: one write for each step that shows anything. shown: its logprobs, where they were asked
    for; then a token is told even when its text is still kept back."""
    await x.begin()
    out = opening
    async for batch in call.pieces():
        for piece in batch if len(batch) <= len(call.answers) else merge(batch):
            if shown is not None:
                before = shown.opening(piece)
                if before is not None:
                    out.append(frames.text(piece.index, *before))
            if piece.text or (shown is not None and piece.tokens):
                out.append(frames.text(piece.index, piece.text, shown and shown.of(piece)))
            if piece.finish is not None:
                out.append(frames.finish(piece.index, piece.finish.kind))
        if out:
            await x.write(b"".join(out))
            out = []
    if frames.last:
        out.append(frames.usage(usage(call, asks)))
    await x.end(b"".join(out) + DONE)


async def _whole(
    x: Exchange,
    frames: Frames,
    choices: Sequence[Mapping[str, Any]],
    used: Mapping[str, Any],
    more: Mapping[str, Any] = {},
) -> None:
    numbered = [{"index": i, **choice} for i, choice in enumerate(choices)]
    await x.json({**frames.head, "choices": numbered, "usage": used, **more})


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
                scores=before.scores + piece.scores,
                prompt_scores=before.prompt_scores + piece.prompt_scores,
            )
        )
    return list(made.values())


def fingerprint(service: Service) -> str:
    """The same for as long as model, weights, backend and what was decided are the same."""
    info = service.info
    decided = [(d.field, str(d.value)) for d in info.decisions]
    text = repr((info.path, info.architecture, info.backend, info.status.device, service.version, decided))
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


def _most(name: str, value: int, least: int = 1) -> int:
    """A chat has no use for 0; a completion of 0 only reads and scores its prompt."""
    if not least <= value < 1 << 31:
        raise InvalidRequest(f"{name}: must be between {least} and {(1 << 31) - 1}, not {value}", field=name)
    return value


def _best_of(form: Completion, most: int) -> int:
    """How many answers are made for each prompt."""
    n = _n(form)
    if form.best_of in (None, n):
        return n
    assert form.best_of is not None
    if form.best_of < n:
        raise InvalidRequest(f"best_of: {form.best_of} is less than n, {n}", field="best_of")
    if form.stream:
        raise InvalidRequest("best_of: is not for stream: true", field="best_of")
    if not most:
        raise InvalidRequest("best_of: needs tokens to choose by; max_tokens is 0", field="best_of")
    return form.best_of


def _best(answers: Sequence[Answer], first: int, count: int, n: int) -> list[int]:
    """Of `count` answers to one prompt the n with the highest mean logprob, best first; all of them stay in order."""
    places = range(first, first + count)
    return list(places) if n == count else sorted(places, key=lambda i: -answers[i].mean)[:n]


def _n(form: Sampled) -> int:
    return 1 if form.n is None else form.n


def _seed(seed: int | None) -> int | None:
    """OpenAI's seeds are signed."""
    return seed % SEEDS if seed is not None and -SEEDS // 2 <= seed < 0 else seed


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "radixmesh",
        "root": service.info.path,
        "max_model_len": service.info.room,
        "weight_version": service.version,
    }
