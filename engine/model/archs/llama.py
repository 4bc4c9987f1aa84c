"""Llama: grouped-query attention, gated feed-forward, RMSNorm. Source: transformers, models/llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.fields import Fields, longest, read_heads, read_rope
from engine.model.parts import attention, finish
from engine.model.rules import Rules
from engine.model.spec import Layer, Mlp, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, count = f.size("hidden_size"), f.size("num_hidden_layers")
    heads, bias = read_heads(f, hidden), f.flag("attention_bias")
    max_len = f.size("max_position_embeddings", 2048)
    rope = read_rope(f, heads[-1], max_len)
    f.only("hidden_act", "silu")
    layer = Layer(
        mixer=attention(heads, rope, bias=bias, out_bias=bias),
        feed=Mlp(size=f.size("intermediate_size"), bias=f.flag("mlp_bias")),
    )
    return finish(f, "llama", hidden, (layer,) * count, longest(rope, max_len), eos=2)


RULES: Rules = {
    "model.embed_tokens.weight": "embed",
    "model.layers.{i}.input_layernorm.weight": "layers.{i}.attention_norm",
    "model.layers.{i}.self_attn.q_proj.weight": "layers.{i}.attention.q",
    "model.layers.{i}.self_attn.k_proj.weight": "layers.{i}.attention.k",
    "model.layers.{i}.self_attn.v_proj.weight": "layers.{i}.attention.v",
    "model.layers.{i}.self_attn.o_proj.weight": "layers.{i}.attention.out",
    "model.layers.{i}.self_attn.q_proj.bias": "layers.{i}.attention.q_bias",
    "model.layers.{i}.self_attn.k_proj.bias": "layers.{i}.attention.k_bias",
    "model.layers.{i}.self_attn.v_proj.bias": "layers.{i}.attention.v_bias",
    "model.layers.{i}.self_attn.o_proj.bias": "layers.{i}.attention.out_bias",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.mlp_norm",
    "model.layers.{i}.mlp.gate_proj.weight": "layers.{i}.mlp.gate",
    "model.layers.{i}.mlp.up_proj.weight": "layers.{i}.mlp.up",
    "model.layers.{i}.mlp.down_proj.weight": "layers.{i}.mlp.down",
    "model.layers.{i}.mlp.gate_proj.bias": "layers.{i}.mlp.gate_bias",
    "model.layers.{i}.mlp.up_proj.bias": "layers.{i}.mlp.up_bias",
    "model.layers.{i}.mlp.down_proj.bias": "layers.{i}.mlp.down_bias",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "head",
}
"""Other families have the same names but for a few, and start from these. A rule of parameters that a model doesn't
have applies to nothing."""

BUFFERS = ("model.layers.{i}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
