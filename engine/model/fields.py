"""The fields of a Hugging Face config.json, each taken by name: what a family leaves over is refused, never ignored."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from engine.errors import ModelError
from engine.model.rope import KINDS, Rope

_LIBRARY = """
architectures model_type transformers_version use_cache tokenizer_class problem_type id2label label2id finetuning_task
task_specific_params _name_or_path name_or_path _attn_implementation attn_implementation attention_implementation
_attn_implementation_autoset return_dict output_hidden_states output_attentions torchscript chunk_size_feed_forward
bos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
"""
_TRAINING = """
initializer_range attention_dropout pretraining_tp resid_pdrop embd_pdrop output_router_logits router_aux_loss_coef
router_jitter_noise
"""
_GENERATE = """
max_length min_length do_sample early_stopping num_beams num_beam_groups num_return_sequences temperature top_k top_p
typical_p diversity_penalty repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
"""
INERT = frozenset(f"{_LIBRARY} {_TRAINING} {_GENERATE}".split())
"""Fields that change nothing about what a model computes: about the library, training, transformers' generate."""

DTYPES = ("float32", "bfloat16", "float16")
THETA = 10000.0
OLD_LONGROPE = ("longrope", "su")
"""Names of longrope; "su" is that of the first Phi-3."""
SLIDING, FULL = "sliding_attention", "full_attention"
"""Names of `layer_types`."""


class Fields:
    """A config being read. A field that is absent or null has its default. Errors are ModelErrors naming the field."""

    def __init__(self, config: Mapping[str, Any], *, file: str = "config.json", prefix: str = "") -> None:
        """prefix: of the names in errors, such as "rope_scaling."."""
        self._left = dict(config)
        self._file, self._prefix = file, prefix

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and not yet taken; null is there."""
        return name in self._left

    def refuse(self, name: str, value: Any, why: str, *, outer: bool = False) -> NoReturn:
        """Raise ModelError: config.json: name = value, and why not. outer: the name stands outside this object."""
        full = name if outer else self._prefix + name
        raise ModelError(f"{self._file}: {full} = {_short(value)}: {why}", field=full)

    def inner(self, name: str, value: Any) -> Fields:
        """The object that field `name` held, as fields of its own."""
        if not isinstance(value, Mapping):
            self.refuse(name, value, "must be an object")
        return Fields(value, file=self._file, prefix=f"{self._prefix}{name}.")

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

    def may(self, name: str, absent: float | None = None) -> float | None:
        """A finite number above 0, or None where the field is null. absent: what a missing field stands for."""
        if name in self and self._left[name] is None:
            self.drop(name)
            return None
        return None if absent is None and name not in self else self.number(name, absent)

    def may_size(self, name: str, absent: int | None = None) -> int | None:
        """`may`, of whole numbers."""
        value = self.may(name, absent)
        if value is not None and value != int(value):
            self.refuse(name, value, "must be a whole number")
        return None if value is None else int(value)

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


def read_heads(
    fields: Fields, hidden: int, *, kv_heads: int | None = None, head_dim: int | None = None
) -> tuple[int, int, int]:
    """Query heads, key-value heads and their size. kv_heads, head_dim: what missing fields stand for; None, as null
    does: as many as query heads, and hidden / query heads."""
    q_heads = fields.size("num_attention_heads")
    shared = fields.may_size("num_key_value_heads", kv_heads) or q_heads
    size = fields.may_size("head_dim", head_dim)
    if size is None and hidden % q_heads:
        what = f"must be a multiple of num_attention_heads = {q_heads}, or head_dim be given"
        fields.refuse("hidden_size", hidden, what)
    if q_heads % shared:
        fields.refuse("num_key_value_heads", shared, f"must divide num_attention_heads = {q_heads}")
    return q_heads, shared, size or hidden // q_heads


def read_rope(
    fields: Fields,
    dim: int,
    max_len: int,
    *,
    theta: float = THETA,
    partial: bool = False,
    original: int | None = None,
    kinds: Collection[str] = KINDS,
) -> Rope:
    """The rotary embedding, as transformers 5 (`rope_parameters`) and 4 (`rope_theta`, `rope_scaling`) write it.

    dim: the head's size. max_len: the config's max_position_embeddings. theta: where the config names no base.
    partial: whether the family rotates a part of each head. original: the config's own
    original_max_position_embeddings. kinds: those that transformers has for the family.
    """
    outer = fields.take("rope_theta")
    new, old = fields.take("rope_parameters"), fields.take("rope_scaling")
    if new and old and new != old:
        fields.refuse("rope_scaling", old, "contradicts rope_parameters")
    given, where = new or old or {}, "rope_parameters" if new else "rope_scaling"
    inner = fields.inner(where, given)
    base = inner.number("rope_theta", theta if outer is None else outer)
    if outer is not None and base != outer:
        fields.refuse("rope_theta", outer, f"contradicts {where}.rope_theta = {base}")
    return rope_of(inner, _rotated(fields, inner, dim, partial), max_len, base, original, kinds)


def _rotated(fields: Fields, inner: Fields, dim: int, partial: bool) -> int:
    """How many dimensions of a head are rotated."""
    if not partial:
        for part in (fields, inner):
            part.only("partial_rotary_factor", 1.0)
        return dim
    outside = fields.take("partial_rotary_factor")
    share = inner.number("partial_rotary_factor", outside or 1.0)
    if share > 1:
        inner.refuse("partial_rotary_factor", share, "must be at most 1")
    if outside is not None and share != outside:
        fields.refuse("partial_rotary_factor", outside, f"contradicts the rope's own, {share}")
    return int(dim * share)


def rope_of(
    inner: Fields, dim: int, max_len: int, theta: float, original: int | None = None, kinds: Collection[str] = KINDS
) -> Rope:
    """The rotary embedding that one object of a config describes, its base aside. dim: dimensions that are rotated."""
    if dim % 2 or not dim:
        inner.refuse("head_dim", dim, "rotary embedding needs an even size", outer=True)
    old_kind = inner.take("type")
    kind = inner.take("rope_type", old_kind or "default")
    if old_kind not in (None, kind):
        inner.refuse("type", old_kind, f"contradicts rope_type = {kind!r}")
    if kind not in kinds:
        inner.refuse("rope_type", kind, f"not supported; {', '.join(kinds)} are")
    if kind in ("llama3", "yarn", "longrope"):
        inside = inner.size("original_max_position_embeddings", original or max_len)
        if original not in (None, inside):
            inner.refuse("original_max_position_embeddings", inside, f"the config's own is {original}")
        original = inside
    made: dict[str, Any] = {"dim": dim, "theta": theta, "kind": "longrope" if kind in OLD_LONGROPE else kind}
    if kind == "linear":
        made |= {"factor": inner.number("factor")}
    elif kind == "dynamic":
        made |= {"factor": inner.number("factor"), "original_max": max_len, "reach": max_len}
    elif kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        made |= {"factor": inner.number("factor"), "low_freq": low, "high_freq": high, "original_max": original}
        if low >= high:
            inner.refuse("low_freq_factor", low, "must be below high_freq_factor")
    elif made["kind"] == "longrope":
        made |= _longrope(inner, dim, max_len, original or max_len)
    elif kind == "yarn":
        made |= _yarn(inner, max_len, original or max_len)
    inner.close()
    return Rope(**made)


def _yarn(inner: Fields, max_len: int, original: int) -> dict[str, Any]:
    factor = inner.number("factor", max_len / original)
    low, high = inner.number("beta_slow", 1.0), inner.number("beta_fast", 32.0)
    if low >= high:
        inner.refuse("beta_slow", low, "must be below beta_fast")
    some, all_dim = inner.take("mscale"), inner.take("mscale_all_dim")
    grown = math.log(factor) if factor > 1 else 0.0
    usual = (0.1 * some * grown + 1) / (0.1 * all_dim * grown + 1) if some and all_dim else 0.1 * grown + 1
    return {
        "factor": factor,
        "low_freq": low,
        "high_freq": high,
        "original_max": original,
        "truncate": inner.flag("truncate", True),
        "magnitude": inner.number("attention_factor", usual),
    }


def _longrope(inner: Fields, dim: int, max_len: int, original: int) -> dict[str, Any]:
    def factors(name: str) -> tuple[float, ...]:
        value = inner.take(name)
        good = isinstance(value, list) and all(type(x) in (int, float) and 0 < x < math.inf for x in value)
        if not good or len(value) != dim // 2:
            inner.refuse(name, value, f"must be {dim // 2} numbers above 0, one for each pair of dimensions")
        return tuple(float(x) for x in value)

    factor = inner.number("factor", max_len / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "short": factors("short_factor"),
        "long": factors("long_factor"),
        "factor": factor,
        "original_max": original,
        "reach": max_len,
        "magnitude": inner.number("attention_factor", usual),
    }


def longest(rope: Rope, max_len: int) -> int:
    """Positions that a model is made for: a dynamic rope goes past max_position_embeddings, by its factor."""
    return int(max_len * rope.factor) if rope.kind == "dynamic" else max_len


def read_windows(fields: Fields, size: int | None, usual: Sequence[str]) -> tuple[int | None, ...]:
    """The window of each layer from `layer_types`: `size` for a sliding layer. usual: where the config names none."""
    kinds = fields.take("layer_types", list(usual))
    if not isinstance(kinds, list) or len(kinds) != len(usual) or not set(kinds) <= {SLIDING, FULL}:
        fields.refuse("layer_types", kinds, f"must be {SLIDING} or {FULL} for each of {len(usual)} layers")
    if SLIDING in kinds and size is None:
        fields.refuse("sliding_window", None, f"a layer is of type {SLIDING}")
    return tuple(size if kind == SLIDING else None for kind in kinds)


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
