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


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    max_new_tokens: at most this many tokens are made; 0 only scores the prompt and is refused for now.
    temperature: 0 is greedy. top_k: 0 or -1 is off. top_p, min_p: in [0, 1]; 1 and 0 are off.
    seed: 64-bit; None draws one per request, which the result returns.
    stop: strings that end the text, cut off unless no_stop_trim. stop_token_ids: ids, beside the model's.
    ignore_eos: go on past the model's end-of-text ids.
    skip_special_tokens: leave special tokens out of the text.
    Penalties: repetition (1 = off), presence and frequency (0 = off).
    """

    max_new_tokens: int = 128
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

    def __post_init__(self) -> None:
        _integer("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**64 - 1)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 2.0, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if len(self.stop) > MAX_STOP:
            raise InvalidRequest(f"stop: at most {MAX_STOP} strings, got {len(self.stop)}", field="stop")
        for s in self.stop:
            if not isinstance(s, str) or not 0 < len(s) <= MAX_STOP_CHARS:
                raise InvalidRequest(f"stop: each must be a string of 1 to {MAX_STOP_CHARS} characters", field="stop")
        if len(self.stop_token_ids) > MAX_STOP:
            raise InvalidRequest(f"stop_token_ids: at most {MAX_STOP}", field="stop_token_ids")
        for i in self.stop_token_ids:
            _integer("stop_token_ids", i, 0, 2**31 - 1)
        for name in ("ignore_eos", "skip_special_tokens", "no_stop_trim"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(f"{name}: must be true or false", field=name)

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
            if name == "stop":
                value = (value,) if isinstance(value, str) else _items(name, value)
            elif name == "stop_token_ids":
                value = _items(name, value)
            values[name] = value
        return cls(**values)


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
