"""Gemma 2: windows on every other layer, soft caps, norms before and after each block, weights of norms from 1 on.

Source: transformers, models/gemma2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.archs import llama
from engine.model.fields import FULL, SLIDING, Fields, longest, read_heads, read_rope, read_windows
from engine.model.parts import attention, finish
from engine.model.rules import Rules
from engine.model.spec import Layer, Mlp, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, count = f.size("hidden_size"), f.size("num_hidden_layers")
    heads, bias = read_heads(f, hidden, kv_heads=4, head_dim=256), f.flag("attention_bias")
    max_len = f.size("max_position_embeddings", 8192)
    rope = read_rope(f, heads[-1], max_len)
    scale, cap = f.number("query_pre_attn_scalar", 256) ** -0.5, f.may("attn_logit_softcapping", 50.0)
    f.only("hidden_activation", "gelu_pytorch_tanh")
    f.drop("hidden_act", "cache_implementation")  # transformers reads hidden_activation; its caches are not ours
    feed = Mlp(size=f.size("intermediate_size"), act="gelu_tanh")
    usual = [FULL if i % 2 else SLIDING for i in range(count)]
    layers = tuple(
        Layer(
            mixer=attention(heads, rope, scale=scale, bias=bias, out_bias=bias, window=window, cap=cap),
            feed=feed,
            sandwich=True,
        )
        for window in read_windows(f, f.may_size("sliding_window", 4096), usual)
    )
    return finish(
        f,
        "gemma2",
        hidden,
        layers,
        longest(rope, max_len),
        tied=True,
        eos=1,
        norm="offset",
        embed_scale=hidden**0.5,
        logit_cap=f.may("final_logit_softcapping", 30.0),
    )


RULES: Rules = {
    **llama.RULES,
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.attention_out_norm",
    "model.layers.{i}.pre_feedforward_layernorm.weight": "layers.{i}.mlp_norm",
    "model.layers.{i}.post_feedforward_layernorm.weight": "layers.{i}.mlp_out_norm",
}

BUFFERS: tuple[str, ...] = ()
