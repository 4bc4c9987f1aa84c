"""SGLang's native forms: /generate, /tokenize, /detokenize, and what an operator asks."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import msgspec

from engine.config import show
from engine.errors import InvalidRequest, ModelError
from engine.installed import version
from engine.run.answer import Answer
from engine.sampling import SamplingParams, scoring
from engine.serve.call import Call
from engine.serve.exchange import ENCODER, Exchange, problem
from engine.serve.reading import HARMLESS, check, renamed
from engine.serve.schemas import (
    GENERATE,
    NATIVE,
    UPDATE,
    Abort,
    Detokenize,
    Generate,
    Nothing,
    Tokenize,
    Update,
    prompts,
)
from engine.serve.service import INLINE, Ask, salted
from engine.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
PACKAGES = ("radixmesh", "jax", "jaxlib", "libtpu", "torch", "triton", "transformers", "tokenizers", "numpy", "uvicorn")


async def generate(x: Exchange) -> None:
    """POST /generate. A stream's text and output_ids are all of the answer so far."""
    form = x.read(Generate, NATIVE)
    x.served(form.model)
    name, what = ("input_ids", form.input_ids) if form.text is None else ("text", form.text)
    if what is None or (form.text is not None and form.input_ids is not None):
        raise InvalidRequest("text: give either text or input_ids", field="text")
    given, many = prompts(what, name)
    if isinstance(given[0], str) != (name == "text"):
        raise InvalidRequest(f"{name}: must be {'texts' if name == 'text' else 'token ids'}", field=name)
    scores, names = scoring(form.return_logprob, form.logprob_start_len, form.top_logprobs_num)
    if form.return_text_in_logprobs and not scores:
        raise InvalidRequest("return_text_in_logprobs: needs return_logprob: true", field="return_text_in_logprobs")
    asks = []
    for i, (prompt, (params, n)) in enumerate(zip(given, _params(form, len(given), many, scores), strict=True)):
        field = f"{name}[{i}]" if many else name
        text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        asks.append(
            Ask(params=params, text=text, ids=ids, n=n, priority=form.priority or 0,
                namespace=salted(form.cache_salt), timeout=form.timeout, names=names, field=field)
        )  # fmt: skip
    call = await x.face.open(x, asks, form.rid)
    try:
        several = many or len(call.answers) > 1
        words = x.face.service.tokenizer if form.return_text_in_logprobs else None
        if form.stream:
            await _stream(x, call, several, words)
        else:
            results = [_result(a, words) for a in await call.whole()]
            await x.json(results if several else results[0])
    finally:
        call.close()


async def _stream(x: Exchange, call: Call, several: bool, words: Tokenizer | None) -> None:
    await x.begin()
    async for batch in call.pieces():
        out = []
        for i in sorted({p.index for p in batch}):
            result = _result(call.answers[i], words) | ({"index": i} if several else {})
            out.append(b"data: " + ENCODER.encode(result) + b"\n\n")
        await x.write(b"".join(out))
    await x.end(DONE)


def _result(answer: Answer, words: Tokenizer | None) -> dict[str, Any]:
    return answer.result(None if words is None else lambda token: words.piece(token)[0])


def _params(form: Generate, count: int, many: bool, scores: Mapping[str, Any]) -> list[tuple[SamplingParams, int]]:
    """The parameters of each prompt, and how many answers it wants."""
    given = form.sampling_params
    if not isinstance(given, list):
        return [_param(given or {}, "sampling_params", scores)] * count
    if not many or len(given) != count:
        raise InvalidRequest(
            f"sampling_params: a list of {len(given)} for {count} prompts; give one each", field="sampling_params"
        )
    return [_param(p, f"sampling_params[{i}]", scores) for i, p in enumerate(given)]


def _param(given: Any, where: str, scores: Mapping[str, Any]) -> tuple[SamplingParams, int]:
    if not isinstance(given, dict):
        raise InvalidRequest(f"{where}: must be an object", field=where)
    values = {k: v for k, v in given.items() if v is not None and k not in HARMLESS}
    n = values.pop("n", 1)
    if type(n) is not int:
        raise InvalidRequest(f"{where}.n: must be an integer", field=f"{where}.n")
    beside = {k: values.pop(k) for k in list(values) if k in GENERATE or k in Generate.__struct_fields__}
    for name in beside:
        if name in Generate.__struct_fields__:
            raise InvalidRequest(f"{where}.{name}: stands beside sampling_params", field=f"{where}.{name}")
    check(beside, (), f"{where}.", GENERATE, lambda name: None)
    try:
        return SamplingParams.of({**values, **scores}), n
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}.{error}", field=f"{where}.{error.field}") from error


async def tokenize(x: Exchange) -> None:
    """POST /tokenize."""
    form = x.read(Tokenize)
    x.served(form.model)
    given, many = prompts(form.prompt, "prompt") if form.prompt else ([""], False)
    ids = []
    for i, text in enumerate(given):
        if not isinstance(text, str):
            raise InvalidRequest("prompt: must be a text or a list of texts", field="prompt")
        name = f"prompt[{i}]" if many else "prompt"
        ids.append(await x.face.service.ids(text, form.add_special_tokens is not False, name))
    counts = [len(i) for i in ids]
    await x.json(
        {
            "tokens": ids if many else ids[0],
            "count": counts if many else counts[0],
            "max_model_len": x.face.service.info.room,
        }
    )


async def detokenize(x: Exchange) -> None:
    """POST /detokenize."""
    form = x.read(Detokenize)
    x.served(form.model)
    given: list[str | list[int]] = [[]]
    given, many = prompts(form.tokens, "tokens") if form.tokens else (given, False)
    service = x.face.service
    vocab = service.info.limits.vocab
    for ids in given:
        if isinstance(ids, str):
            raise InvalidRequest("tokens: must be a list of integers, or a list of such lists", field="tokens")
        bad = next((i for i in ids if not 0 <= i < vocab), None)
        if bad is not None:
            raise InvalidRequest(f"tokens: {bad} is not in the vocabulary of {vocab}", field="tokens")
    special = form.skip_special_tokens is False

    def texts() -> list[str]:
        return [service.decode(ids, special) for ids in given if not isinstance(ids, str)]

    made = await asyncio.to_thread(texts) if sum(map(len, given)) > INLINE else texts()
    await x.json({"text": made if many else made[0]})


async def abort(x: Exchange) -> None:
    """POST /abort_request. The id of an answer, of a whole call, or X-Request-Id."""
    form = x.read(Abort)
    if not form.rid and not form.abort_all:
        raise InvalidRequest("rid: is missing; name a request, or give abort_all: true", field="rid")
    rid = "" if form.abort_all else (form.rid or "").removeprefix("chatcmpl-").removeprefix("cmpl-")
    await x.json({"aborted": x.face.service.abort(rid)})


async def flush(x: Exchange) -> None:
    """POST /flush_cache."""
    if x.body.strip():
        x.read(Nothing)
    await x.face.service.flush()
    await x.json({"flushed": True})


async def update(x: Exchange) -> None:
    """POST /update_weights_from_disk."""
    form, service = x.read(Update, UPDATE), x.face.service
    if form.abort_all_requests:
        service.abort("")
    try:
        with renamed({"path": "model_path"}):
            version = await service.update(form.model_path)
    except ModelError as error:
        status, body, _ = problem(error)
        await x.json({"success": False, "message": str(error), **msgspec.json.decode(body)}, status)
        return
    said = f"the weights of {form.model_path} are version {version}"
    await x.json({"success": True, "message": said, "num_paused_requests": 0, "weight_version": version})


async def info(x: Exchange) -> None:
    """GET /server_info: what was asked, what was decided, how it stands. Never the key."""
    service, told = x.face.service, x.face.service.info
    await x.json(
        {
            "model": service.name,
            "model_path": told.path,
            "architecture": told.architecture,
            "weight_version": service.version,
            "backend": told.backend,
            "max_model_len": told.room,
            "config": {k: v for k, v in show(x.face.config) if not k.endswith("api_key")},
            "decisions": [{"field": d.field, "value": _plain(d.value), "why": d.why} for d in told.decisions],
            "limits": _plain(asdict(told.limits)),
            "stages": [{"name": name, "seconds": seconds} for name, seconds in told.stages],
            "started": _plain(asdict(told.status)),
            "stats": None if service.stats is None else _plain(asdict(service.stats)),
            "ready": service.ready,
            "open_requests": service.open_requests,
            "created": service.created,
            "versions": versions(),
        }
    )


@cache
def versions() -> dict[str, str]:
    """Of Python and the packages that matter, where they are installed."""
    found = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | {name: each for name, each in found.items() if each}


def _plain(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
