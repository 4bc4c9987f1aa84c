"""Mistral: Llama with a window on every layer, where the config names one. Source: transformers, models/mistral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.archs import llama
from engine.model.fields import Fields, longest, read_dtype, read_eos, read_heads, read_rope
from engine.model.rules import Rules
from engine.model.spec import Attention, Layer, Mlp, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, vocab = f.size("hidden_size"), f.size("vocab_size")
    q_heads, kv_heads, head_dim = read_heads(f, hidden, kv_heads=8)
    max_len = f.size("max_position_embeddings", 131072)
    rope = read_rope(f, head_dim, max_len)
    f.only("hidden_act", "silu")
    layer = Layer(
        mixer=Attention(
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            scale=head_dim**-0.5,
            window=f.may_size("sliding_window", 4096),  # null, as from version 0.2 on: none
        ),
        feed=Mlp(size=f.size("intermediate_size")),
    )
    found = ModelSpec(
        family="mistral",
        vocab=vocab,
        hidden=hidden,
        layers=(layer,) * f.size("num_hidden_layers"),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        tied=f.flag("tie_word_embeddings"),
        max_len=longest(rope, max_len),
        dtype=read_dtype(f),
        eos=read_eos(f, vocab, absent=2),
    )
    f.close()
    return found


RULES: Rules = llama.RULES
BUFFERS = llama.BUFFERS
