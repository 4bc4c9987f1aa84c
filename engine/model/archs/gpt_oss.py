"""GPT-OSS: a sink on each head, windows on every other layer, experts with biases and a clamped gate. bfloat16.

Source: transformers, models/gpt_oss. The experts' tensors stand input first, gate and up in turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.archs import llama
from engine.model.fields import FULL, SLIDING, Fields, longest, read_heads, read_rope, read_windows
from engine.model.parts import attention, finish, read_top_k
from engine.model.rules import Rule, Rules
from engine.model.spec import Experts, Layer, ModelSpec

YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description, from the content of config.json. Raises ModelError naming a field that can't be honoured."""
    named = config.get("rope_parameters") or config.get("rope_scaling")
    f = Fields(config if named else {**config, "rope_parameters": YARN})
    quantised = f.take("quantization_config")
    if quantised is not None:
        what = "MXFP4 experts are not built; convert the checkpoint to bfloat16, with transformers' dequantize"
        f.refuse("quantization_config", quantised, what)
    hidden, count = f.size("hidden_size"), f.size("num_hidden_layers")
    heads, bias = read_heads(f, hidden, kv_heads=8, head_dim=64), f.flag("attention_bias", True)
    max_len = f.size("max_position_embeddings", 131072)
    rope = read_rope(f, heads[-1], max_len, theta=150000.0)
    f.only("hidden_act", "silu")
    feed, usual = _experts(f), [FULL if i % 2 else SLIDING for i in range(count)]
    layers = tuple(
        Layer(mixer=attention(heads, rope, bias=bias, out_bias=bias, window=window, sinks=True), feed=feed)
        for window in read_windows(f, f.may_size("sliding_window", 128), usual)
    )
    return finish(f, "gpt_oss", hidden, layers, longest(rope, max_len), norm_eps=1e-5, norm="wide")


def _experts(f: Fields) -> Experts:
    count = f.size("num_local_experts", 128)
    top_k = read_top_k(f, 4, count, "num_local_experts")
    f.only("experts_per_token", top_k)
    f.drop("initial_context_length")  # original_max_position_embeddings of the rope, again
    return Experts(
        count=count,
        top_k=top_k,
        size=f.size("intermediate_size", 2880),
        renormalised=True,
        act="clamped",
        alpha=f.number("swiglu_alpha", 1.702),
        limit=f.number("swiglu_limit", 7.0),
        bias=True,
    )


RULES: Rules = {
    **llama.RULES,
    "model.layers.{i}.self_attn.sinks": "layers.{i}.attention.sinks",
    "model.layers.{i}.mlp.router.weight": "layers.{i}.moe.router",
    "model.layers.{i}.mlp.router.bias": "layers.{i}.moe.router_bias",
    "model.layers.{i}.mlp.experts.gate_up_proj": Rule(
        "layers.{i}.moe.gate", "layers.{i}.moe.up", dim=1, interleaved=True, transposed=True
    ),
    "model.layers.{i}.mlp.experts.gate_up_proj_bias": Rule(
        "layers.{i}.moe.gate_bias", "layers.{i}.moe.up_bias", dim=1, interleaved=True
    ),
    "model.layers.{i}.mlp.experts.down_proj": Rule("layers.{i}.moe.down", transposed=True),
    "model.layers.{i}.mlp.experts.down_proj_bias": "layers.{i}.moe.down_bias",
}

BUFFERS: tuple[str, ...] = ()
