"""Gemma 2: windows on every other layer, soft caps, norms before and after each block, weights of norms from 1 on.

Source: transformers, models/gemma2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.archs import llama
from engine.model.fields import (
    FULL,
    SLIDING,
    Fields,
    longest,
    read_dtype,
    read_eos,
    read_heads,
    read_rope,
    read_windows,
)
from engine.model.rules import Rules
from engine.model.spec import Attention, Layer, Mlp, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, vocab, count = f.size("hidden_size"), f.size("vocab_size"), f.size("num_hidden_layers")
    q_heads, kv_heads, head_dim = read_heads(f, hidden, kv_heads=4, head_dim=256)
    max_len, bias = f.size("max_position_embeddings", 8192), f.flag("attention_bias")
    rope = read_rope(f, head_dim, max_len)
    scale, cap = f.number("query_pre_attn_scalar", 256) ** -0.5, f.may("attn_logit_softcapping", 50.0)
    f.only("hidden_activation", "gelu_pytorch_tanh")
    f.drop("hidden_act", "cache_implementation")  # transformers reads hidden_activation; its caches are not ours
    feed = Mlp(size=f.size("intermediate_size"), act="gelu_tanh")
    usual = [FULL if i % 2 else SLIDING for i in range(count)]
    layers = tuple(
        Layer(
            mixer=Attention(
                q_heads=q_heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                rope=rope,
                scale=scale,
                bias=bias,
                out_bias=bias,
                window=window,
                cap=cap,
            ),
            feed=feed,
            sandwich=True,
        )
        for window in read_windows(f, f.may_size("sliding_window", 4096), usual)
    )
    found = ModelSpec(
        family="gemma2",
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        norm_eps=f.number("rms_norm_eps", 1e-6),
        norm="offset",
        tied=f.flag("tie_word_embeddings", True),
        max_len=longest(rope, max_len),
        dtype=read_dtype(f),
        eos=read_eos(f, vocab, absent=1),
        embed_scale=hidden**0.5,
        logit_cap=f.may("final_logit_softcapping", 30.0),
    )
    f.close()
    return found


RULES: Rules = {
    **llama.RULES,
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.attention_out_norm",
    "model.layers.{i}.pre_feedforward_layernorm.weight": "layers.{i}.mlp_norm",
    "model.layers.{i}.post_feedforward_layernorm.weight": "layers.{i}.mlp_out_norm",
}

BUFFERS: tuple[str, ...] = ()
