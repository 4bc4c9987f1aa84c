"""Mixtral: Mistral with experts in place of the feed-forward. Source: transformers, models/mixtral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.archs import llama
from engine.model.fields import Fields, longest, read_heads, read_rope
from engine.model.parts import attention, finish, read_top_k
from engine.model.rules import Rules
from engine.model.spec import Experts, Layer, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, layers = f.size("hidden_size"), f.size("num_hidden_layers")
    heads, max_len = read_heads(f, hidden, kv_heads=8), f.size("max_position_embeddings", 131072)
    rope = read_rope(f, heads[-1], max_len, theta=1e6)
    f.only("hidden_act", "silu")
    count = f.size("num_local_experts", 8)
    layer = Layer(
        mixer=attention(heads, rope, window=f.may_size("sliding_window")),
        feed=Experts(
            count=count,
            top_k=read_top_k(f, 2, count, "num_local_experts"),
            size=f.size("intermediate_size"),
            renormalised=True,
        ),
    )
    return finish(f, "mixtral", hidden, (layer,) * layers, longest(rope, max_len), norm_eps=1e-5, eos=2)


RULES: Rules = {
    **llama.RULES,
    "model.layers.{i}.block_sparse_moe.gate.weight": "layers.{i}.moe.router",
    "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight": "layers.{i}.moe.gate",
    "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight": "layers.{i}.moe.up",
    "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight": "layers.{i}.moe.down",
}

BUFFERS = llama.BUFFERS
