"""Qwen3-MoE: Qwen3 with experts in place of the feed-forward, on all layers or some. Source: transformers,
models/qwen3_moe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.archs import qwen3
from engine.model.fields import Fields, longest, read_heads, read_rope
from engine.model.parts import attention, finish, read_top_k
from engine.model.rules import Rules
from engine.model.spec import Experts, Layer, Mlp, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, layers = f.size("hidden_size"), f.size("num_hidden_layers")
    heads, bias = read_heads(f, hidden, kv_heads=4), f.flag("attention_bias")
    max_len = f.size("max_position_embeddings", 32768)
    rope = read_rope(f, heads[-1], max_len)
    f.only("hidden_act", "silu")
    sliding, size = f.flag("use_sliding_window"), f.may_size("sliding_window", 4096)
    f.drop("max_window_layers")  # unlike in Qwen3, all layers have the window
    window = size if sliding else None
    mixer = attention(heads, rope, bias=bias, out_bias=bias, qk_norm=True, window=window)
    count = f.size("num_experts", config.get("num_local_experts"))
    f.only("num_local_experts", count)  # the same field, as transformers 5 writes it
    experts = Experts(
        count=count,
        top_k=read_top_k(f, 8, count, "num_experts"),
        size=f.size("moe_intermediate_size", 768),
        renormalised=f.flag("norm_topk_prob"),
    )
    dense, step = f.take("mlp_only_layers", []), f.size("decoder_sparse_step", 1)
    if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < layers for i in dense):
        f.refuse("mlp_only_layers", dense, f"must be layers from 0 to {layers - 1}")
    plain = Mlp(size=f.size("intermediate_size", 6144))
    feeds = (plain if i in dense or (i + 1) % step else experts for i in range(layers))
    return finish(
        f, "qwen3_moe", hidden, tuple(Layer(mixer=mixer, feed=feed) for feed in feeds), longest(rope, max_len)
    )


RULES: Rules = {
    **qwen3.RULES,
    "model.layers.{i}.mlp.gate.weight": "layers.{i}.moe.router",
    "model.layers.{i}.mlp.experts.{e}.gate_proj.weight": "layers.{i}.moe.gate",
    "model.layers.{i}.mlp.experts.{e}.up_proj.weight": "layers.{i}.moe.up",
    "model.layers.{i}.mlp.experts.{e}.down_proj.weight": "layers.{i}.moe.down",
}

BUFFERS: tuple[str, ...] = ()
