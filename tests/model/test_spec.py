"""A description says what transformers' configuration objects say, for both forms of config.json, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from engine.errors import ModelError
from engine.model.archs import llama, qwen3
from engine.model.registry import read_spec
from engine.model.spec import ModelSpec
from tests.tiny import SHAPES, assert_honest, tiny

FAMILY = {
    "llama": (llama, LlamaConfig, LlamaRotaryEmbedding),
    "qwen3": (qwen3, Qwen3Config, Qwen3RotaryEmbedding),
}
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# As the makers published them, in the form of transformers 4.
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": ("llama", LLAMA_31_8B),
    "qwen3-0.6b": ("qwen3", QWEN3_06B),
    "llama-defaults": ("llama", SIZES),
    "llama-nulls": (
        "llama",
        SIZES | dict.fromkeys(("num_key_value_heads", "head_dim", "rope_scaling", "eos_token_id")),
    ),
    "llama-biases": ("llama", SIZES | {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
    "llama-half": ("llama", SIZES | {"dtype": "float16", "num_key_value_heads": 2, "head_dim": 20}),
    "llama-linear": ("llama", SIZES | {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 7e4}),
    "llama-new-rope": ("llama", SIZES | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "tie_word_embeddings": True}),
    "llama-old-max": (
        "llama",
        SIZES
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 4,
                "low_freq_factor": 1,
                "high_freq_factor": 8,
                "rope_theta": 10000,
            },
            "max_position_embeddings": 300,
        },
    ),
    "qwen3-null-heads": ("qwen3", SIZES | {"num_key_value_heads": None}),
    "qwen3-absent-heads": ("qwen3", SIZES | {"num_attention_heads": 64}),
    "qwen3-biases": ("qwen3", SIZES | {"attention_bias": True, "head_dim": 40, "num_key_value_heads": 3}),
    "qwen3-window-off": ("qwen3", SIZES | {"sliding_window": 4096, "num_key_value_heads": 1, "eos_token_id": [3, 4]}),
    "qwen3-linear": (
        "qwen3",
        SIZES
        | {"num_key_value_heads": 6, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}},
    ),
}


def assert_says(spec: ModelSpec, hf: PreTrainedConfig) -> None:
    """Every figure of the description against transformers' object."""
    assert (spec.vocab, spec.hidden, len(spec.layers)) == (hf.vocab_size, hf.hidden_size, hf.num_hidden_layers)
    assert (spec.norm_eps, spec.tied, spec.max_len) == (
        hf.rms_norm_eps,
        hf.tie_word_embeddings,
        hf.max_position_embeddings,
    )
    assert spec.dtype == str(hf.dtype or torch.float32).removeprefix("torch.")
    for layer in spec.layers:
        a = layer.mixer
        assert (a.q_heads, a.kv_heads, a.head_dim) == (hf.num_attention_heads, hf.num_key_value_heads, hf.head_dim)
        assert (a.bias, a.out_bias) == (hf.attention_bias, hf.attention_bias)
        assert (a.qk_norm, a.window, a.scale) == (hf.model_type == "qwen3", None, hf.head_dim**-0.5)
        assert (layer.feed.size, layer.feed.act) == (hf.intermediate_size, hf.hidden_act)
        assert layer.feed.bias == getattr(hf, "mlp_bias", False)
    assert spec.family == hf.model_type
    eos = hf.eos_token_id
    assert list(spec.eos) == ([] if eos is None else eos if isinstance(eos, list) else [eos])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_description_says_what_transformers_says(name: str, tmp_path: Path) -> None:
    family, config = CONFIGS[name]
    module, kind, rotary = FAMILY[family]
    hf = kind.from_dict(json.loads(json.dumps(config)))
    spec = module.spec(config)
    assert_says(spec, hf)
    hf.architectures = [f"{'Llama' if family == 'llama' else 'Qwen3'}ForCausalLM"]
    hf.save_pretrained(tmp_path)  # in the form of transformers 5, with every default written out
    assert_says(read_spec(tmp_path), hf)

    rope = spec.layers[0].mixer.rope
    assert rope is not None
    frequencies = rotary(hf).inv_freq.numpy()
    np.testing.assert_allclose(rope.frequencies(), frequencies, rtol=3e-7, atol=0)
    assert rope.frequencies().dtype == np.float32
    if rope.kind != "default":
        by_name = ROPE_INIT_FUNCTIONS[rope.kind](hf)[0].numpy()
        np.testing.assert_allclose(rope.frequencies(), by_name, rtol=3e-7, atol=0)
        plain = 1.0 / rope.theta ** (np.arange(0, rope.dim, 2) / rope.dim)
        assert not np.allclose(frequencies, plain, rtol=0.1, atol=0)


def test_llama3_frequencies_take_all_three_branches() -> None:
    config = SIZES | {"head_dim": 64, "rope_scaling": LLAMA3, "rope_theta": 5e5}
    rope = llama.spec(config).layers[0].mixer.rope
    assert rope is not None
    plain = LlamaRotaryEmbedding(LlamaConfig.from_dict(SIZES | {"head_dim": 64, "rope_theta": 5e5}))
    ratio = rope.frequencies() / plain.inv_freq.numpy()
    assert (ratio == 1).any()
    assert np.isclose(ratio, 1 / 8).any()
    assert ((ratio > 0.13) & (ratio < 0.99)).any()


@pytest.mark.parametrize(
    ("family", "change", "field"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.rope_type"),
        ("qwen3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": -2}}, "rope_scaling.factor"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2}}, "rope_scaling.type"),
        ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "rope_scaling.low_freq_factor"),
        ("llama", {"rope_scaling": LLAMA3 | {"beta_fast": 32}}, "rope_scaling.beta_fast"),
        ("llama", {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}, "rope_theta"),
        ("llama", {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_theta": 1e4}}, "rope_scaling"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"sliding_window": 4096}, "sliding_window"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map"),
        ("llama", {"logit_scale": 0.5}, "logit_scale"),
        ("llama", {"dtype": "float64"}, "dtype"),
        ("llama", {"torch_dtype": "int8"}, "torch_dtype"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads"),
        ("qwen3", {"num_key_value_heads": 5}, "num_key_value_heads"),
        ("llama", {"num_attention_heads": 7}, "hidden_size"),
        ("llama", {"head_dim": 15}, "head_dim"),
        ("llama", {"hidden_size": None}, "hidden_size"),
        ("llama", {"vocab_size": 12.5}, "vocab_size"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers"),
        ("llama", {"intermediate_size": "many"}, "intermediate_size"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ("llama", {"attention_bias": "yes"}, "attention_bias"),
        ("llama", {"eos_token_id": 1000}, "eos_token_id"),
        ("llama", {"eos_token_id": [1, "2"]}, "eos_token_id"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(family: str, change: dict[str, Any], field: str) -> None:
    module = FAMILY[family][0]
    config = SIZES | {"num_key_value_heads": 6}
    module.spec(config)
    with pytest.raises(ModelError, match=field.replace(".", r"\.")) as e:
        module.spec(config | change)
    assert e.value.field == field
    assert "\n" not in str(e.value)


def test_a_head_size_of_its_own_needs_no_divisor() -> None:
    assert llama.spec(SIZES | {"num_attention_heads": 7, "head_dim": 16}).layers[0].mixer.head_dim == 16


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_of_parity_are_honest(name: str, tmp_path: Path) -> None:
    model = tiny(tmp_path, **SHAPES[name])
    assert_honest(model)
    assert len(set(model.greedy([1, 2, 3], 12))) > 4
    assert_says(read_spec(tmp_path), model.hf.config)
