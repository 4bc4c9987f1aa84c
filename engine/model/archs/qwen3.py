"""Qwen3: an RMSNorm on each head of q and k, a head size of its own. Source: transformers, models/qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.archs import llama
from engine.model.archs.qwen2 import read_sliding
from engine.model.fields import Fields, longest, read_dtype, read_eos, read_heads, read_rope
from engine.model.rules import Rules
from engine.model.spec import Attention, Layer, Mlp, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, vocab = f.size("hidden_size"), f.size("vocab_size")
    q_heads, kv_heads, head_dim = read_heads(f, hidden, kv_heads=32, head_dim=128)
    max_len, bias = f.size("max_position_embeddings", 32768), f.flag("attention_bias")
    rope = read_rope(f, head_dim, max_len)
    f.only("hidden_act", "silu")
    feed = Mlp(size=f.size("intermediate_size"))
    layers = tuple(
        Layer(
            mixer=Attention(
                q_heads=q_heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                rope=rope,
                scale=head_dim**-0.5,
                bias=bias,
                out_bias=bias,
                qk_norm=True,
                window=window,
            ),
            feed=feed,
        )
        for window in read_sliding(f, f.size("num_hidden_layers"))
    )
    found = ModelSpec(
        family="qwen3",
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
    **llama.RULES,
    "model.layers.{i}.self_attn.q_norm.weight": "layers.{i}.attention.q_norm",
    "model.layers.{i}.self_attn.k_norm.weight": "layers.{i}.attention.k_norm",
}

BUFFERS: tuple[str, ...] = ()
