"""Mixtral: Mistral with experts in place of the feed-forward. Source: transformers, models/mixtral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.archs import llama
from engine.model.fields import Fields, longest, read_dtype, read_eos, read_heads, read_rope
from engine.model.rules import Rules
from engine.model.spec import Attention, Experts, Layer, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, vocab = f.size("hidden_size"), f.size("vocab_size")
    q_heads, kv_heads, head_dim = read_heads(f, hidden, kv_heads=8)
    max_len = f.size("max_position_embeddings", 131072)
    rope = read_rope(f, head_dim, max_len, theta=1e6)
    f.only("hidden_act", "silu")
    experts = Experts(
        count=f.size("num_local_experts", 8),
        top_k=f.size("num_experts_per_tok", 2),
        size=f.size("intermediate_size"),
        renormalised=True,
    )
    if experts.top_k > experts.count:
        f.refuse("num_experts_per_tok", experts.top_k, f"must be at most num_local_experts = {experts.count}")
    layer = Layer(
        mixer=Attention(
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            scale=head_dim**-0.5,
            window=f.may_size("sliding_window"),
        ),
        feed=experts,
    )
    found = ModelSpec(
        family="mixtral",
        vocab=vocab,
        hidden=hidden,
        layers=(layer,) * f.size("num_hidden_layers"),
        norm_eps=f.number("rms_norm_eps", 1e-5),
        tied=f.flag("tie_word_embeddings"),
        max_len=longest(rope, max_len),
        dtype=read_dtype(f),
        eos=read_eos(f, vocab, absent=2),
    )
    f.close()
    return found


RULES: Rules = {
    **llama.RULES,
    "model.layers.{i}.block_sparse_moe.gate.weight": "layers.{i}.moe.router",
    "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight": "layers.{i}.moe.gate",
    "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight": "layers.{i}.moe.up",
    "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight": "layers.{i}.moe.down",
}

BUFFERS = llama.BUFFERS
