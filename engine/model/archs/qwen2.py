"""Qwen2 and 2.5: Llama with biases on q, k and v, and windows on the upper layers where they are switched on.

Source: transformers, models/qwen2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.archs import llama
from engine.model.fields import FULL, SLIDING, Fields, longest, read_heads, read_rope, read_windows
from engine.model.parts import attention, finish
from engine.model.rules import Rules
from engine.model.spec import Layer, Mlp, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, count = f.size("hidden_size"), f.size("num_hidden_layers")
    heads, max_len = read_heads(f, hidden, kv_heads=32), f.size("max_position_embeddings", 32768)
    rope = read_rope(f, heads[-1], max_len)
    f.only("hidden_act", "silu")
    feed = Mlp(size=f.size("intermediate_size"))
    layers = tuple(
        Layer(mixer=attention(heads, rope, bias=True, window=window), feed=feed) for window in read_sliding(f, count)
    )
    return finish(f, "qwen2", hidden, layers, longest(rope, max_len))


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
