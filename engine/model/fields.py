"""The fields of a Hugging Face config.json, each taken by name: what a family leaves over is refused, never ignored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from engine.errors import ModelError
from engine.model.spec import Rope

_LIBRARY = """
architectures model_type transformers_version use_cache tokenizer_class problem_type id2label label2id finetuning_task
task_specific_params _name_or_path name_or_path _attn_implementation attn_implementation attention_implementation
_attn_implementation_autoset return_dict output_hidden_states output_attentions torchscript chunk_size_feed_forward
bos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
"""
_TRAINING = "initializer_range attention_dropout pretraining_tp"
_GENERATE = """
max_length min_length do_sample early_stopping num_beams num_beam_groups num_return_sequences temperature top_k top_p
typical_p diversity_penalty repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
"""
INERT = frozenset(f"{_LIBRARY} {_TRAINING} {_GENERATE}".split())
"""Fields that change nothing about what a model computes: about the library, training, transformers' generate."""

DTYPES = ("float32", "bfloat16", "float16")
THETA = 10000.0


class Fields:
    """A config being read. A field that is absent or null has its default. Errors are ModelErrors naming the field."""

    def __init__(self, config: Mapping[str, Any], *, file: str = "config.json", prefix: str = "") -> None:
        """prefix: of the names in errors, such as "rope_scaling."."""
        self._left = dict(config)
        self._file, self._prefix = file, prefix

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and not yet taken; null is there."""
        return name in self._left

    def refuse(self, name: str, value: Any, why: str) -> NoReturn:
        """Raise ModelError: config.json: name = value, and why not."""
        raise ModelError(f"{self._file}: {self._prefix}{name} = {_short(value)}: {why}", field=self._prefix + name)

    def take(self, name: str, default: Any = None) -> Any:
        """The value as it stands, or the default."""
        value = self._left.pop(name, None)
        return default if value is None else value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.take(name, default)
        if value is None:
            raise ModelError(f"{self._file}: {self._prefix}{name} is missing", field=self._prefix + name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.refuse(name, value, "must be a number above 0")
        return float(value)

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.number(name, default)
        if value != int(value):
            self.refuse(name, value, "must be a whole number")
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            self.refuse(name, value, "must be true or false")
        return value

    def only(self, name: str, accepted: Any) -> None:
        """A field with one value that is honoured, which is also the default."""
        value = self.take(name, accepted)
        if value != accepted:
            self.refuse(name, value, f"not supported; {_short(accepted)} is")

    def drop(self, *names: str) -> None:
        """Fields that change nothing, given those already taken."""
        for name in names:
            self._left.pop(name, None)

    def close(self) -> None:
        """Refuse every field that is left, unless it is inert, null, false or empty."""
        for name, value in self._left.items():
            if name not in INERT and not (value is None or value is False or value in ({}, [], "")):
                self.refuse(name, value, "this field is not supported")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def read_rope(fields: Fields, dim: int, max_len: int) -> Rope:
    """The rotary embedding, as transformers 5 (`rope_parameters`) and 4 (`rope_theta`, `rope_scaling`) write it.

    dim: the head's size. max_len: default of llama3's original_max_position_embeddings, as in transformers.
    """
    theta = fields.take("rope_theta")
    new, old = fields.take("rope_parameters"), fields.take("rope_scaling")
    if new and old and new != old:
        fields.refuse("rope_scaling", old, "contradicts rope_parameters")
    given = new or old or {}
    where = "rope_parameters" if new else "rope_scaling"
    if not isinstance(given, Mapping):
        fields.refuse(where, given, "must be an object")
    inner = Fields(given, prefix=where + ".")
    base = inner.number("rope_theta", THETA if theta is None else theta)
    if theta is not None and base != theta:
        fields.refuse("rope_theta", theta, f"contradicts {where}.rope_theta = {base}")
    for part in (fields, inner):
        part.only("partial_rotary_factor", 1.0)
    if dim % 2:
        fields.refuse("head_dim", dim, "rotary embedding needs an even size")
    old_kind = inner.take("type")
    kind = inner.take("rope_type", old_kind or "default")
    if old_kind not in (None, kind):
        inner.refuse("type", old_kind, f"contradicts rope_type = {kind!r}")
    rope = Rope(dim=dim, theta=base)
    if kind == "linear":
        rope = Rope(dim=dim, theta=base, kind="linear", factor=inner.number("factor"))
    elif kind == "llama3":
        rope = Rope(
            dim=dim,
            theta=base,
            kind="llama3",
            factor=inner.number("factor"),
            low_freq=inner.number("low_freq_factor"),
            high_freq=inner.number("high_freq_factor"),
            original_max=inner.size("original_max_position_embeddings", max_len),
        )
        if rope.low_freq >= rope.high_freq:
            inner.refuse("low_freq_factor", rope.low_freq, "must be below high_freq_factor")
    elif kind != "default":
        inner.refuse("rope_type", kind, "not supported; default, linear and llama3 are")
    inner.close()
    return rope


def read_dtype(fields: Fields) -> str:
    """`dtype` (transformers 5) or `torch_dtype` (4); float32 where neither is given."""
    new, old = fields.take("dtype"), fields.take("torch_dtype")
    name = "torch_dtype" if new is None else "dtype"
    value = new or old or "float32"
    if value not in DTYPES:
        fields.refuse(name, value, f"not supported; {', '.join(DTYPES)} are")
    return str(value)


def read_eos(fields: Fields, vocab: int, absent: int | None = None) -> tuple[int, ...]:
    """`eos_token_id`: null, one id or a list of ids, each below `vocab`. absent: what a missing field stands for."""
    value = fields.take("eos_token_id", [] if absent is None or "eos_token_id" in fields else absent)
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < vocab for i in ids):
        fields.refuse("eos_token_id", value, f"must be ids from 0 to {vocab - 1}")
    return tuple(ids)
