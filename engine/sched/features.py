"""Whether what a request asks of the sampler can be honoured: on this backend, and at all."""

from __future__ import annotations

from collections.abc import Iterable

from backends.api.limits import Limits
from engine.errors import InvalidRequest
from engine.sched.request import Request
from engine.sched.stop import stopping

PENALTIES = (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0))
"""Names, and the values that are off."""


def check_features(request: Request, limits: Limits) -> None:
    """Raise InvalidRequest naming the parameter that can't be honoured."""
    params = request.params
    _known("stop_token_ids", params.stop_token_ids, limits)
    _known("logit_bias", (token for token, _ in params.logit_bias), limits)
    _known("allowed_token_ids", params.allowed_token_ids or (), limits)
    if params.bad_words and not request.bad_words:
        raise InvalidRequest("bad_words: there is no tokenizer (skip_tokenizer) to read them with", field="bad_words")
    _known("bad_words", (token for word in request.bad_words for token in word), limits)
    if params.penalised and limits.max_history < limits.max_len:
        name = next(n for n, off in PENALTIES if getattr(params, n) != off)
        raise InvalidRequest(f"{name}: penalties are not built or switched off here (sched.penalties)", field=name)
    if len(params.logit_bias) > limits.max_bias:
        says = f"this backend takes at most {limits.max_bias} ids" if limits.max_bias else "this backend has none yet"
        raise InvalidRequest(f"logit_bias: {says}", field="logit_bias")
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(params, name)
        if wanted is not None and not limits.max_logprobs:
            raise InvalidRequest(f"{name}: not built or switched off here (sched.max_logprobs)", field=name)
        if wanted is not None and wanted > limits.max_logprobs:
            most = f"at most {limits.max_logprobs} alternatives (sched.max_logprobs)"
            raise InvalidRequest(f"{name}: {most}, not {wanted}", field=name)
    if params.logprob_start_len >= len(request.tokens):
        raise InvalidRequest(
            f"logprob_start_len: {params.logprob_start_len} is past the prompt of {len(request.tokens)} tokens",
            field="logprob_start_len",
        )
    _masks(request, limits)


def _known(name: str, ids: Iterable[int], limits: Limits) -> None:
    bad = next((i for i in ids if not 0 <= i < limits.vocab), None)
    if bad is not None:
        raise InvalidRequest(f"{name}: {bad} is not in the vocabulary of {limits.vocab}", field=name)


def _masks(request: Request, limits: Limits) -> None:
    """Something must be left to make, whatever is made before: so every token that a bad word may end with counts as
    forbidden, which refuses more than need be only where a handful of tokens is allowed."""
    params = request.params
    early = stopping(params, request.eos) if params.min_new_tokens else frozenset()
    bad = {word[-1] for word in request.bad_words if word}
    asked = (
        ("allowed_token_ids", params.allowed_token_ids is not None),
        ("min_new_tokens", bool(early)),
        ("bad_words", bool(bad)),
        ("grammar", request.grammar is not None),
    )
    if not limits.max_masks:
        for name, given in asked:
            if given:
                raise InvalidRequest(f"{name}: this backend has no vocabulary masks yet", field=name)
    allowed = None if params.allowed_token_ids is None else set(params.allowed_token_ids)
    for name, forbidden in (("bad_words", bad), ("min_new_tokens", early | bad)):
        left = limits.vocab - len(forbidden) if allowed is None else len(allowed - forbidden)
        if forbidden and left <= 0:
            raise InvalidRequest(f"{name}: may leave no token that could be made", field=name)
