"""Qwen3: an RMSNorm on each head of q and k, a head size of its own. Source: transformers, models/qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.fields import Fields, read_dtype, read_eos, read_rope
from engine.model.spec import Attention, Layer, Mlp, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, q_heads = f.size("hidden_size"), f.size("num_attention_heads")
    max_len = f.size("max_position_embeddings", 32768)
    head_dim, vocab = f.size("head_dim", 128), f.size("vocab_size")
    # An absent field and a null one differ in transformers: 32, and as many as query heads.
    kv_heads = f.size("num_key_value_heads", q_heads if "num_key_value_heads" in f else 32)
    bias, count = f.flag("attention_bias"), f.size("num_hidden_layers")
    f.only("hidden_act", "silu")
    f.only("use_sliding_window", False)
    f.only("layer_types", ["full_attention"] * count)
    f.drop("sliding_window", "max_window_layers")
    layer = Layer(
        mixer=Attention(
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=read_rope(f, head_dim, max_len),
            scale=head_dim**-0.5,
            bias=bias,
            out_bias=bias,
            qk_norm=True,
        ),
        feed=Mlp(size=f.size("intermediate_size")),
    )
    if q_heads % kv_heads:
        f.refuse("num_key_value_heads", kv_heads, f"must divide num_attention_heads = {q_heads}")
    found = ModelSpec(
        family="qwen3",
        vocab=vocab,
        hidden=hidden,
        layers=(layer,) * count,
        norm_eps=f.number("rms_norm_eps", 1e-6),
        tied=f.flag("tie_word_embeddings"),
        max_len=max_len,
        dtype=read_dtype(f),
        eos=read_eos(f, vocab),
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
    "model.layers.{i}.self_attn.q_norm.weight": "layers.{i}.attention.q_norm",
    "model.layers.{i}.self_attn.k_norm.weight": "layers.{i}.attention.k_norm",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.mlp_norm",
    "model.layers.{i}.mlp.gate_proj.weight": "layers.{i}.mlp.gate",
    "model.layers.{i}.mlp.up_proj.weight": "layers.{i}.mlp.up",
    "model.layers.{i}.mlp.down_proj.weight": "layers.{i}.mlp.down",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "head",
}

BUFFERS: tuple[str, ...] = ()
