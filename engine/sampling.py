"""What a request asks of the sampler, and the limits of each parameter. Names are SGLang's."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.errors import InvalidRequest

MAX_STOP = 64
MAX_STOP_CHARS = 4096
MAX_BIAS = 1024
MAX_BAD_WORDS = 256
MAX_LOGPROBS = 20
IDS = 2**31 - 1
"""The largest token id that can be asked for; whether the model has it is engine.sched.features' to say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    max_new_tokens: at most this many tokens are made; 0 only reads, and scores, the prompt.
    min_new_tokens: before so many are made, no id that stops is made and no stop string is looked for.
    temperature: 0 is greedy. top_k: 0 or -1 is off. top_p, min_p: in [0, 1]; 1 and 0 are off.
    seed: 64-bit; None draws one per request, which the result returns.
    stop: strings that end the text, cut off unless no_stop_trim. stop_token_ids: ids, beside the model's.
    ignore_eos: go on past the model's end-of-text ids.
    skip_special_tokens: leave special tokens out of the text.
    Penalties: repetition (1 = off), presence and frequency (0 = off).
    logit_bias: (id, value) pairs, values in [-100, 100] added to logits; `of` takes a mapping.
    allowed_token_ids: nothing else is made; None is everything. bad_words: texts that are never made.
    logprobs: alternatives beside each token's own logprob, 0 to 20; None is no logprobs. prompt_logprobs: likewise of
    the prompt; logprob_start_len: the first of its tokens that is listed, itself without a logprob, as SGLang has it.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_start_len: int = 0

    def __post_init__(self) -> None:
        _integer("max_new_tokens", self.max_new_tokens, 0, 2**31 - 1)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**64 - 1)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 2.0, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _strings("stop", self.stop, MAX_STOP)
        _strings("bad_words", self.bad_words, MAX_BAD_WORDS)
        if len(self.stop_token_ids) > MAX_STOP:
            raise InvalidRequest(f"stop_token_ids: at most {MAX_STOP}", field="stop_token_ids")
        _ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise InvalidRequest(
                    "allowed_token_ids: is empty, so that nothing could be made", field="allowed_token_ids"
                )
            _ids("allowed_token_ids", self.allowed_token_ids)
        _bias(self.logit_bias)
        for name in ("ignore_eos", "skip_special_tokens", "no_stop_trim"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(f"{name}: must be true or false", field=name)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        _integer("logprob_start_len", self.logprob_start_len, 0, 2**31 - 1)
        if self.logprob_start_len and self.prompt_logprobs is None:
            raise InvalidRequest("logprob_start_len: is only for prompt_logprobs", field="logprob_start_len")
        _integer("min_new_tokens", self.min_new_tokens, 0, 2**31 - 1)
        if self.min_new_tokens > self.max_new_tokens:
            raise InvalidRequest(
                f"min_new_tokens: {self.min_new_tokens} is more than max_new_tokens, {self.max_new_tokens}",
                field="min_new_tokens",
            )

    @property
    def penalised(self) -> bool:
        """Whether any penalty is on, so that the device must know the request's history."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @classmethod
    def of(cls, given: SamplingParams | Mapping[str, Any] | None) -> SamplingParams:
        """Read a mapping with SGLang's names. None means the default; an unknown name is refused with the nearest."""
        if given is None:
            return cls()
        if isinstance(given, SamplingParams):
            return given
        if not isinstance(given, Mapping):
            raise InvalidRequest("sampling_params: must be a mapping or SamplingParams", field="sampling_params")
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name == "sampling_seed":  # SGLang's name for it
                name = "seed"
            if name not in known:
                near = difflib.get_close_matches(str(name), sorted(known), 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise InvalidRequest(f"{name}: unknown sampling parameter{hint}", field=str(name))
            if value is None:
                continue
            if name in ("stop", "bad_words"):
                value = (value,) if isinstance(value, str) else _items(name, value)
            elif name in ("stop_token_ids", "allowed_token_ids"):
                value = _items(name, value)
            elif name == "logit_bias":
                value = biases(value)
            values[name] = value
        return cls(**values)


def scoring(
    return_logprob: bool | None, logprob_start_len: int | None = None, top_logprobs_num: int | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """SGLang's fields of logprobs as parameters, and the parameters' names as those fields. logprob_start_len: -1 or
    None is nothing of the prompt. Raises InvalidRequest."""
    start, top = logprob_start_len, top_logprobs_num
    if not return_logprob:
        for name, given in (("logprob_start_len", start not in (None, -1)), ("top_logprobs_num", bool(top))):
            if given:
                raise InvalidRequest(f"{name}: needs return_logprob: true", field=name)
        return {}, {}
    name = "top_logprobs_num" if top else "return_logprob"
    names = {"logprobs": name, "prompt_logprobs": name}
    if top is not None:
        _integer("top_logprobs_num", top, 0, MAX_LOGPROBS)
    if start is None or start == -1:
        return {"logprobs": top or 0}, names
    _integer("logprob_start_len", start, -1, 2**31 - 1)
    return {"logprobs": top or 0, "prompt_logprobs": top or 0, "logprob_start_len": start}, names


def biases(given: Any) -> tuple[tuple[int, float], ...]:
    """A logit bias as SamplingParams has it. given: a mapping of ids, or of strings of them as JSON has it, to values,
    or pairs. Raises InvalidRequest."""
    if not isinstance(given, Mapping):
        return _items("logit_bias", given)
    out = []
    for key, value in given.items():
        if isinstance(key, str):
            if not (key.isascii() and key.isdecimal() and len(key) <= 10 and str(int(key)) == key):
                raise InvalidRequest(f"logit_bias: {key[:32]!r} is not a token id", field="logit_bias")
            key = int(key)
        out.append((key, value))
    return tuple(out)


def _bias(pairs: Any) -> None:
    """Refuse what is not (id, value) pairs of different ids."""
    if len(pairs) > MAX_BIAS:
        raise InvalidRequest(f"logit_bias: at most {MAX_BIAS} ids, got {len(pairs)}", field="logit_bias")
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InvalidRequest("logit_bias: must map token ids to values", field="logit_bias")
        _integer("logit_bias", pair[0], 0, IDS)
        _number("logit_bias", pair[1], -100.0, 100.0)
    if len({int(token) for token, _ in pairs}) != len(pairs):
        raise InvalidRequest("logit_bias: a token id twice", field="logit_bias")


def _strings(name: str, values: Any, most: int) -> None:
    if len(values) > most:
        raise InvalidRequest(f"{name}: at most {most} strings, got {len(values)}", field=name)
    for s in values:
        if not isinstance(s, str) or not 0 < len(s) <= MAX_STOP_CHARS:
            raise InvalidRequest(f"{name}: each must be a string of 1 to {MAX_STOP_CHARS} characters", field=name)


def _ids(name: str, values: Any) -> None:
    """Token ids; lists may be as long as a vocabulary, so the ordinary case is looked at in one go."""
    if all(type(i) is int for i in values) and (not values or (min(values) >= 0 and max(values) <= IDS)):
        return
    for i in values:
        _integer(name, i, 0, IDS)


def _items(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(value)
    raise InvalidRequest(f"{name}: must be a list", field=name)


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidRequest(f"{name}: must be an integer, not {value!r}", field=name)
    if not low <= int(value) <= high:
        raise InvalidRequest(f"{name}: must be between {low} and {high}, not {value}", field=name)


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidRequest(f"{name}: must be a finite number, not {value!r}", field=name)
    if not low <= value <= high or (open_low and value == low):
        edge = "above" if open_low else "at least"
        raise InvalidRequest(f"{name}: must be {edge} {low:g} and at most {high:g}, not {value:g}", field=name)
