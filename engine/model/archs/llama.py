"""Llama: grouped-query attention, gated feed-forward, RMSNorm. Source: transformers, models/llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.fields import Fields, read_dtype, read_eos, read_rope
from engine.model.spec import Attention, Layer, Mlp, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, q_heads = f.size("hidden_size"), f.size("num_attention_heads")
    max_len = f.size("max_position_embeddings", 2048)
    if hidden % q_heads and config.get("head_dim") is None:
        f.refuse("hidden_size", hidden, f"must be a multiple of num_attention_heads = {q_heads}, or head_dim be given")
    head_dim, vocab = f.size("head_dim", hidden // q_heads), f.size("vocab_size")
    bias = f.flag("attention_bias")
    f.only("hidden_act", "silu")
    layer = Layer(
        mixer=Attention(
            q_heads=q_heads,
            kv_heads=f.size("num_key_value_heads", q_heads),
            head_dim=head_dim,
            rope=read_rope(f, head_dim, max_len),
            scale=head_dim**-0.5,
            bias=bias,
            out_bias=bias,
        ),
        feed=Mlp(size=f.size("intermediate_size"), bias=f.flag("mlp_bias")),
    )
    if q_heads % layer.mixer.kv_heads:
        f.refuse("num_key_value_heads", layer.mixer.kv_heads, f"must divide num_attention_heads = {q_heads}")
    found = ModelSpec(
        family="llama",
        vocab=vocab,
        hidden=hidden,
        layers=(layer,) * f.size("num_hidden_layers"),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        tied=f.flag("tie_word_embeddings"),
        max_len=max_len,
        dtype=read_dtype(f),
        eos=read_eos(f, vocab, absent=2),
    )
    f.close()
    return found


RULES: Mapping[str, str] = {
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

BUFFERS = ("model.layers.{i}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
