"""Qwen3: an RMSNorm on each head of q and k, a head size of its own. Source: transformers, models/qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.archs import llama
from engine.model.archs.qwen2 import read_sliding
from engine.model.fields import Fields, longest, read_heads, read_rope
from engine.model.parts import attention, finish
from engine.model.rules import Rules
from engine.model.spec import Layer, Mlp, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, count = f.size("hidden_size"), f.size("num_hidden_layers")
    heads, bias = read_heads(f, hidden, kv_heads=32, head_dim=128), f.flag("attention_bias")
    max_len = f.size("max_position_embeddings", 32768)
    rope = read_rope(f, heads[-1], max_len)
    f.only("hidden_act", "silu")
    feed = Mlp(size=f.size("intermediate_size"))
    layers = tuple(
        Layer(mixer=attention(heads, rope, bias=bias, out_bias=bias, qk_norm=True, window=window), feed=feed)
        for window in read_sliding(f, count)
    )
    return finish(f, "qwen3", hidden, layers, longest(rope, max_len))


RULES: Rules = {
    **llama.RULES,
    "model.layers.{i}.self_attn.q_norm.weight": "layers.{i}.attention.q_norm",
    "model.layers.{i}.self_attn.k_norm.weight": "layers.{i}.attention.k_norm",
}

BUFFERS: tuple[str, ...] = ()
