"""Mistral: Llama with a window on every layer, where the config names one. Source: transformers, models/mistral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.archs import llama
from engine.model.fields import Fields, longest, read_heads, read_rope
from engine.model.parts import attention, finish
from engine.model.rules import Rules
from engine.model.spec import Layer, Mlp, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, count = f.size("hidden_size"), f.size("num_hidden_layers")
    heads, max_len = read_heads(f, hidden, kv_heads=8), f.size("max_position_embeddings", 131072)
    rope = read_rope(f, heads[-1], max_len)
    f.only("hidden_act", "silu")
    window = f.may_size("sliding_window", 4096)  # null, as from version 0.2 on: none
    layer = Layer(mixer=attention(heads, rope, window=window), feed=Mlp(size=f.size("intermediate_size")))
    return finish(f, "mistral", hidden, (layer,) * count, longest(rope, max_len), eos=2)


RULES: Rules = llama.RULES
BUFFERS = llama.BUFFERS
