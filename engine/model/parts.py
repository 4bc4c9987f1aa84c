"""What the families' files share: attention of these heads, how many experts, and what every config says of a model."""

from __future__ import annotations

from typing import Any

from engine.model.fields import Fields, read_dtype, read_eos
from engine.model.narrow import read_narrow
from engine.model.rope import Rope
from engine.model.spec import Attention, Layer, ModelSpec


def attention(heads: tuple[int, int, int], rope: Rope, **own: Any) -> Attention:
    """Attention of heads as `read_heads` gives them, scores scaled by the root of their size. own: the family's other
    fields of Attention, another scale among them."""
    q_heads, kv_heads, head_dim = heads
    usual = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim, "rope": rope, "scale": head_dim**-0.5}
    return Attention(**(usual | own))


def read_top_k(fields: Fields, usual: int, count: int, among: str) -> int:
    """num_experts_per_tok, of the `count` that field `among` names. usual: where the field is missing."""
    top_k = fields.size("num_experts_per_tok", usual)
    if top_k > count:
        fields.refuse("num_experts_per_tok", top_k, f"must be at most {among} = {count}")
    return top_k


def finish(
    fields: Fields,
    family: str,
    hidden: int,
    layers: tuple[Layer, ...],
    max_len: int,
    *,
    norm_eps: float = 1e-6,
    tied: bool = False,
    eos: int | None = None,
    **own: Any,
) -> ModelSpec:
    """The model of these layers. Reads what every family's config has and refuses, by name, what no one has taken.

    norm_eps, tied, eos: what missing fields stand for. own: the family's other fields of ModelSpec.
    """
    vocab = fields.size("vocab_size")
    found = ModelSpec(
        family=family,
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        norm_eps=fields.number("rms_norm_eps", norm_eps),
        tied=fields.flag("tie_word_embeddings", tied),
        max_len=max_len,
        dtype=read_dtype(fields),
        eos=read_eos(fields, vocab, absent=eos),
        narrow=read_narrow(fields),
        **own,
    )
    fields.close()
    return found
