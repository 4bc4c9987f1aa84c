"""A description says what transformers' configuration objects say, for both forms of config.json, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig, PreTrainedConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from engine.errors import ModelError
from engine.model.archs import llama
from engine.model.registry import ARCHITECTURES, FAMILIES, read_spec
from engine.model.spec import Experts, ModelSpec, fit
from tests.tiny import SHAPES, assert_honest, tiny

ROTARY = {
    "llama": LlamaRotaryEmbedding,
    "qwen2": Qwen2RotaryEmbedding,
    "qwen3": Qwen3RotaryEmbedding,
    "mistral": MistralRotaryEmbedding,
    "gemma2": Gemma2RotaryEmbedding,
    "gemma3_text": Gemma3RotaryEmbedding,
    "phi3": Phi3RotaryEmbedding,
    "gpt_oss": GptOssRotaryEmbedding,
    "qwen3_moe": Qwen3MoeRotaryEmbedding,
    "mixtral": MixtralRotaryEmbedding,
}
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
KV = {"num_key_value_heads": 3}
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
LLAMA_1_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_2_7B = LLAMA_1_7B | {
    "max_position_embeddings": 4096,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
}
LLAMA_32_1B = LLAMA_31_8B | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA3 | {"factor": 32.0},
    "tie_word_embeddings": True,
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
QWEN25_7B = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
MISTRAL_7B = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}
GEMMA2_2B = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 256000,
}
GEMMA3_1B = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 262144,
}
PHI3_MINI_128K = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1 + i / 3 for i in range(48)],
        "short_factor": [1 + i / 40 for i in range(48)],
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32064,
}
GPT_OSS_20B = {
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}
QWEN3_30B_A3B = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MIXTRAL_8X7B = MISTRAL_7B | {
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-7b": ("qwen2", QWEN25_7B),
    "qwen2-windows": ("qwen2", SIZES | {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1} | KV),
    "mistral-7b": ("mistral", MISTRAL_7B),
    "mistral-no-window": ("mistral", SIZES | {"sliding_window": None, "head_dim": 20} | KV),
    "mistral-absent-window": ("mistral", SIZES | KV),
    "gemma2-2b": ("gemma2", GEMMA2_2B),
    "gemma2-no-caps": (
        "gemma2",
        SIZES | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False} | KV,
    ),
    "gemma3-1b": ("gemma3_text", GEMMA3_1B),
    "gemma3-old-rope": (
        "gemma3_text",
        SIZES | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 2} | KV,
    ),
    "phi3-mini-128k": ("phi3", PHI3_MINI_128K),
    "gpt-oss-20b": ("gpt_oss", GPT_OSS_20B),
    "gpt-oss-defaults": ("gpt_oss", SIZES | KV),
    "qwen3-30b-a3b": ("qwen3_moe", QWEN3_30B_A3B),
    "qwen3-moe-some-dense": (
        "qwen3_moe",
        SIZES | {"decoder_sparse_step": 2, "num_experts": 16, "use_sliding_window": True, "sliding_window": 30} | KV,
    ),
    "mixtral-8x7b": ("mixtral", MIXTRAL_8X7B),
    "llama-dynamic": ("llama", SIZES | {"rope_scaling": DYNAMIC, "max_position_embeddings": 64}),
    "qwen3-windows": ("qwen3", SIZES | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2} | KV),
    "llama-1-7b": ("llama", LLAMA_1_7B),
    "llama-2-7b": ("llama", LLAMA_2_7B),
    "llama-3.1-8b": ("llama", LLAMA_31_8B),
    "llama-3.2-1b": ("llama", LLAMA_32_1B),
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
    dynamic = (hf.rope_parameters.get("rope_type") == "dynamic") * hf.rope_parameters.get("factor", 1)
    assert (spec.norm_eps, spec.tied, spec.max_len) == (
        hf.rms_norm_eps,
        hf.tie_word_embeddings,
        hf.max_position_embeddings * (dynamic or 1),
    )
    assert spec.dtype == str(hf.dtype or torch.float32).removeprefix("torch.")
    gemma, kind = hf.model_type.startswith("gemma"), hf.model_type
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    bias = True if kind == "qwen2" else getattr(hf, "attention_bias", False)
    for i, layer in enumerate(spec.layers):
        a = layer.mixer
        assert (a.q_heads, a.kv_heads, a.head_dim) == (hf.num_attention_heads, hf.num_key_value_heads, head_dim)
        assert (a.bias, a.out_bias) == (bias, bias and kind != "qwen2")
        assert a.qk_norm == (kind in ("qwen3", "qwen3_moe", "gemma3_text"))
        assert a.scale == (hf.query_pre_attn_scalar if gemma else head_dim) ** -0.5
        types = getattr(hf, "layer_types", None)
        full = types and types[i] == "full_attention"
        assert a.window == (None if full else getattr(hf, "sliding_window", None))
        assert a.cap == (hf.attn_logit_softcapping if kind == "gemma2" else None)
        assert a.sinks == (kind == "gpt_oss")
        assert layer.sandwich == gemma
        if not isinstance(layer.feed, Experts):
            assert layer.feed.size == hf.intermediate_size
            assert layer.feed.act == ("gelu_tanh" if gemma else hf.hidden_act)
            assert layer.feed.bias == getattr(hf, "mlp_bias", False)
            continue
        e = layer.feed
        assert (e.count, e.top_k) == (hf.num_local_experts, hf.num_experts_per_tok)
        assert e.size == (hf.moe_intermediate_size if kind == "qwen3_moe" else hf.intermediate_size)
        assert e.renormalised == (hf.norm_topk_prob if kind == "qwen3_moe" else True)
        if kind == "gpt_oss":
            assert (e.alpha, e.limit, e.act, e.bias) == (hf.swiglu_alpha, hf.swiglu_limit, "clamped", True)
    sparse = [isinstance(layer.feed, Experts) for layer in spec.layers]
    if kind == "qwen3_moe":
        step, dense = hf.decoder_sparse_step, hf.mlp_only_layers
        assert sparse == [i not in dense and not (i + 1) % step for i in range(len(sparse))]
    else:
        assert all(s == (kind in ("mixtral", "gpt_oss")) for s in sparse)
    assert spec.family == hf.model_type
    assert spec.embed_scale == (hf.hidden_size**0.5 if gemma else 1)
    assert spec.logit_cap == (hf.final_logit_softcapping if gemma else None)
    eos = hf.eos_token_id
    assert list(spec.eos) == ([] if eos is None else eos if isinstance(eos, list) else [eos])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_description_says_what_transformers_says(name: str, tmp_path: Path) -> None:
    family, config = CONFIGS[name]
    hf = CONFIG_MAPPING[family].from_dict(json.loads(json.dumps(config)))
    spec = FAMILIES[family].spec(config)
    assert_says(spec, hf)
    hf.architectures = [next(name for name, of in ARCHITECTURES.items() if of == family)]
    hf.save_pretrained(tmp_path)  # in the form of transformers 5, with every default written out
    saved = read_spec(tmp_path)
    assert_says(saved, hf)
    assert saved == spec

    rotary = ROTARY[family](hf)
    for i, layer in enumerate(spec.layers):
        rope, kind = layer.mixer.rope, f"{hf.layer_types[i]}_" if family == "gemma3_text" else ""
        assert rope is not None
        frequencies, magnitude = getattr(rotary, kind + "inv_freq").numpy(), getattr(rotary, kind + "attention_scaling")
        fitted = fit(spec, 1).layers[i].mixer.rope  # as transformers starts, from a short sequence
        np.testing.assert_allclose(fitted.frequencies(), frequencies, rtol=3e-7, atol=0)
        assert rope.frequencies().dtype == np.float32
        assert rope.magnitude == pytest.approx(magnitude, rel=1e-12)
    if rope.kind not in ("default", "dynamic"):
        plain = 1.0 / rope.theta ** (np.arange(0, rope.dim, 2) / rope.dim)
        assert not np.allclose(rope.frequencies(), plain, rtol=0.1, atol=0)


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
        ("llama", {"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}, "rope_scaling.rope_type"),
        ("llama", {"rope_scaling": {"type": "su", "factor": 4.0}}, "rope_scaling.rope_type"),
        ("llama", {"rope_scaling": {"type": "dynamic"}}, "rope_scaling.factor"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_slow": 40}}, "rope_scaling.beta_slow"),
        ("qwen3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.short_factor"),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "rope_parameters.short_factor",
        ),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type"),
        ("phi3", {"rope_scaling": {"partial_rotary_factor": 1.5}}, "rope_scaling.partial_rotary_factor"),
        (
            "phi3",
            {"rope_scaling": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.25},
            "partial_rotary_factor",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"sliding_window": 2.5}, "sliding_window"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gemma2", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "layer_types"),
        ("gemma2", {"sliding_window": None}, "sliding_window"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {"rope_type": "linear"}}},
            "rope_parameters.full_attention.factor",
        ),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
        ("gpt_oss", {"num_experts_per_tok": 200}, "num_experts_per_tok"),
        ("gpt_oss", {"experts_per_token": 3}, "experts_per_token"),
        ("mixtral", {"num_local_experts": 1}, "num_experts_per_tok"),
        ("qwen3_moe", {"num_experts": 8, "num_local_experts": 9}, "num_local_experts"),
        ("qwen3_moe", {"num_experts": 8, "mlp_only_layers": [3]}, "mlp_only_layers"),
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
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": -1}, "max_window_layers"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_window"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config.quant_method"),
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
    module = FAMILIES[family]
    config = SIZES | {"num_key_value_heads": 6} | ({"num_experts": 8} if family == "qwen3_moe" else {})
    module.spec(config | ({"eos_token_id": 2} if family == "phi3" else {}))
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
