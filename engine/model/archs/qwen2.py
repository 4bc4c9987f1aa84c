"""Qwen2 and 2.5: Llama with biases on q, k and v, and windows on the upper layers where they are switched on.

Source: transformers, models/qwen2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.archs import llama
from engine.model.fields import (
    FULL,
    SLIDING,
    Fields,
    longest,
    read_dtype,
    read_eos,
    read_heads,
    read_rope,
    read_windows,
)
from engine.model.rules import Rules
from engine.model.spec import Attention, Layer, Mlp, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, vocab = f.size("hidden_size"), f.size("vocab_size")
    q_heads, kv_heads, head_dim = read_heads(f, hidden, kv_heads=32)
    max_len = f.size("max_position_embeddings", 32768)
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
                bias=True,
                window=window,
            ),
            feed=feed,
        )
        for window in read_sliding(f, f.size("num_hidden_layers"))
    )
    found = ModelSpec(
        family="qwen2",
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


def read_sliding(f: Fields, count: int) -> tuple[int | None, ...]:
    """The window of each layer, as Qwen's configs say it: none unless use_sliding_window, and then where layer_types
    says so, or from layer max_window_layers on."""
    on, size, first = f.flag("use_sliding_window"), f.may_size("sliding_window", 4096), f.take("max_window_layers", 28)
    if type(first) is not int or first < 0:
        f.refuse("max_window_layers", first, "must be a whole number from 0")
    size = size if on else None
    return read_windows(f, size, [SLIDING if size and i >= first else FULL for i in range(count)])


RULES: Rules = llama.RULES
BUFFERS = llama.BUFFERS
