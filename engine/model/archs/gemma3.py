"""Gemma 3, text: five windowed layers to a full one, each kind with a rope of its own, norms on heads of q and k.

Source: transformers, models/gemma3, Gemma3ForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.archs import gemma2, qwen3
from engine.model.fields import FULL, SLIDING, Fields, longest, read_heads, read_windows, rope_of
from engine.model.parts import attention, finish
from engine.model.rope import Rope
from engine.model.rules import Rules
from engine.model.spec import Layer, Mlp, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    f = Fields(config)
    hidden, count = f.size("hidden_size"), f.size("num_hidden_layers")
    heads, bias = read_heads(f, hidden, kv_heads=4, head_dim=256), f.flag("attention_bias")
    max_len = f.size("max_position_embeddings", 131072)
    ropes = _ropes(f, heads[-1], max_len)
    scale = f.number("query_pre_attn_scalar", 256) ** -0.5
    f.only("hidden_activation", "gelu_pytorch_tanh")
    f.only("attn_logit_softcapping", None)  # transformers has the field and does nothing with it
    f.drop("hidden_act", "cache_implementation")
    feed = Mlp(size=f.size("intermediate_size"), act="gelu_tanh")
    pattern = f.size("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
    f.only("_sliding_window_pattern", pattern)  # the same field, as transformers 5 writes it
    usual = [SLIDING if (i + 1) % pattern else FULL for i in range(count)]
    own = {"scale": scale, "bias": bias, "out_bias": bias, "qk_norm": True}
    layers = tuple(
        Layer(
            mixer=attention(heads, ropes[SLIDING if window else FULL], window=window, **own), feed=feed, sandwich=True
        )
        for window in read_windows(f, f.may_size("sliding_window", 4096), usual)
    )
    return finish(
        f,
        "gemma3_text",
        hidden,
        layers,
        longest(ropes[FULL], max_len),
        tied=True,
        eos=1,
        norm="offset",
        embed_scale=hidden**0.5,
        logit_cap=f.may("final_logit_softcapping"),
    )


def _ropes(f: Fields, dim: int, max_len: int) -> dict[str, Rope]:
    """The rope of each kind of layer: in rope_parameters, or, older, rope_theta and rope_scaling for full layers and
    rope_local_base_freq for windowed ones."""
    bases = {FULL: f.number("rope_theta", 1e6), SLIDING: f.number("rope_local_base_freq", 1e4)}
    old, new = f.take("rope_scaling"), f.take("rope_parameters")
    if old and new:
        f.refuse("rope_scaling", old, "stands beside rope_parameters")
    where = "rope_parameters" if new else "rope_scaling"
    both = f.inner(where, new or {FULL: old or {}})
    out = {}
    for kind, base in bases.items():
        inner = both.inner(kind, both.take(kind, {})) if new else f.inner(where, (old or {}) if kind == FULL else {})
        theta = inner.number("rope_theta", base)
        inner.only("partial_rotary_factor", 1.0)
        out[kind] = rope_of(inner, dim, max_len, theta)
    if new:
        both.close()
    return out


RULES: Rules = {**qwen3.RULES, **gemma2.RULES}

BUFFERS: tuple[str, ...] = ()
