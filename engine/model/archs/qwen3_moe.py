"""Qwen3-MoE: Qwen3 with experts in place of the feed-forward, on all layers or some. Source: transformers,
models/qwen3_moe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.archs import qwen3
from engine.model.fields import Fields, longest, read_dtype, read_eos, read_heads, read_rope
from engine.model.rules import Rules
from engine.model.spec import Attention, Experts, Layer, Mlp, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, vocab, count = f.size("hidden_size"), f.size("vocab_size"), f.size("num_hidden_layers")
    q_heads, kv_heads, head_dim = read_heads(f, hidden, kv_heads=4)
    max_len, bias = f.size("max_position_embeddings", 32768), f.flag("attention_bias")
    rope = read_rope(f, head_dim, max_len)
    f.only("hidden_act", "silu")
    sliding, size = f.flag("use_sliding_window"), f.may_size("sliding_window", 4096)
    f.drop("max_window_layers")  # unlike in Qwen3, all layers have the window
    mixer = Attention(
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        scale=head_dim**-0.5,
        bias=bias,
        out_bias=bias,
        qk_norm=True,
        window=size if sliding else None,
    )
    experts = Experts(
        count=f.size("num_experts", config.get("num_local_experts")),
        top_k=f.size("num_experts_per_tok", 8),
        size=f.size("moe_intermediate_size", 768),
        renormalised=f.flag("norm_topk_prob"),
    )
    f.only("num_local_experts", experts.count)  # the same field, as transformers 5 writes it
    if experts.top_k > experts.count:
        f.refuse("num_experts_per_tok", experts.top_k, f"must be at most num_experts = {experts.count}")
    dense, step = f.take("mlp_only_layers", []), f.size("decoder_sparse_step", 1)
    if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < count for i in dense):
        f.refuse("mlp_only_layers", dense, f"must be layers from 0 to {count - 1}")
    plain = Mlp(size=f.size("intermediate_size", 6144))
    layers = tuple(Layer(mixer=mixer, feed=plain if i in dense or (i + 1) % step else experts) for i in range(count))
    found = ModelSpec(
        family="qwen3_moe",
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        norm_eps=f.number("rms_norm_eps", 1e-6),
        tied=f.flag("tie_word_embeddings"),
        max_len=longest(rope, max_len),
        dtype=read_dtype(f),
        eos=read_eos(f, vocab),
    )
    f.close()
    return found


RULES: Rules = {
    **qwen3.RULES,
    "model.layers.{i}.mlp.gate.weight": "layers.{i}.moe.router",
    "model.layers.{i}.mlp.experts.{e}.gate_proj.weight": "layers.{i}.moe.gate",
    "model.layers.{i}.mlp.experts.{e}.up_proj.weight": "layers.{i}.moe.up",
    "model.layers.{i}.mlp.experts.{e}.down_proj.weight": "layers.{i}.moe.down",
}

BUFFERS: tuple[str, ...] = ()
