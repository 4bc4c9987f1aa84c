"""Phi-3 and 4 mini: q, k, v in one tensor, gate and up in another, long ropes, a part of each head rotated.

Source: transformers, models/phi3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.archs import llama
from engine.model.fields import Fields, read_heads, read_rope
from engine.model.parts import attention, finish
from engine.model.rules import Rule, Rules
from engine.model.spec import Layer, Mlp, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, count = f.size("hidden_size"), f.size("num_hidden_layers")
    heads = read_heads(f, hidden)
    max_len, original = f.size("max_position_embeddings", 4096), f.size("original_max_position_embeddings", 4096)
    rope = read_rope(f, heads[-1], max_len, partial=True, original=original, kinds=("default", "longrope", "su"))
    f.only("hidden_act", "silu")
    f.drop("auto_map")  # the first checkpoints name code of their own; transformers has the model since
    layer = Layer(
        mixer=attention(heads, rope, window=f.may_size("sliding_window")),
        feed=Mlp(size=f.size("intermediate_size")),
    )
    return finish(f, "phi3", hidden, (layer,) * count, max_len, norm_eps=1e-5, eos=32000)


RULES: Rules = {
    "model.embed_tokens.weight": "embed",
    "model.layers.{i}.input_layernorm.weight": "layers.{i}.attention_norm",
    "model.layers.{i}.self_attn.qkv_proj.weight": Rule(
        "layers.{i}.attention.q", "layers.{i}.attention.k", "layers.{i}.attention.v"
    ),
    "model.layers.{i}.self_attn.o_proj.weight": "layers.{i}.attention.out",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.mlp_norm",
    "model.layers.{i}.mlp.gate_up_proj.weight": Rule("layers.{i}.mlp.gate", "layers.{i}.mlp.up"),
    "model.layers.{i}.mlp.down_proj.weight": "layers.{i}.mlp.down",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "head",
}

BUFFERS = llama.BUFFERS
