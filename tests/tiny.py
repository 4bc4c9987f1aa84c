"""Small random Hugging Face models with honest weights: logits that differ, attention that chooses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

torch.set_num_threads(1)  # these models are too small to share: threads that wait for each other cost seconds

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""original_max_position_embeddings is set so low that a context of 40 tokens sees all three branches."""

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.4, 1.6, 2.0],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 7.0, 9.0],
}
GEMMA2 = {"sliding_window": 14, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "norm_eps": 1e-2}
GEMMA3 = {"sliding_window": 11, "query_pre_attn_scalar": 24, "norm_eps": 1e-2}
GPT_OSS = {
    "sliding_window": 12,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "swiglu_limit": 2.0,
    "ffn": 48,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-grouped": {"hidden": 64, "q_heads": 4, "kv_heads": 2},
    "llama-odd-heads": {"hidden": 96, "q_heads": 6, "kv_heads": 2, "head_dim": 10, "layers": 3, "vocab": 193},
    "llama-one-kv-head": {"hidden": 80, "q_heads": 5, "kv_heads": 1, "head_dim": 32, "tied": True},
    "llama-biases": {"hidden": 48, "q_heads": 3, "kv_heads": 3, "bias": True, "layers": 3},
    "llama-2": {"q_heads": 4, "kv_heads": 4, "norm_eps": 1e-5, "max_len": 256},  # and the first
    "llama-rope-llama3": {  # 3.1; with a tied head 3.2
        "q_heads": 4,
        "kv_heads": 2,
        "head_dim": 24,
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32},
        "tied": True,
    },
    "llama-rope-linear": {"q_heads": 8, "kv_heads": 2, "rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "qwen3-grouped": {"family": "qwen3", "hidden": 64, "q_heads": 4, "kv_heads": 2, "head_dim": 32},
    "qwen3-odd-heads": {"family": "qwen3", "hidden": 56, "q_heads": 6, "kv_heads": 3, "head_dim": 20, "tied": True},
    "qwen3-biases": {"family": "qwen3", "q_heads": 5, "kv_heads": 1, "head_dim": 16, "bias": True, "layers": 3},
    "llama-rope-dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}, "max_len": 32},
    "qwen2-yarn": {
        "family": "qwen2",
        "hidden": 48,
        "q_heads": 6,
        "tied": True,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    },
    "qwen2-half-windowed": {
        "family": "qwen2",
        "q_heads": 4,
        "kv_heads": 1,
        "use_sliding_window": True,
        "sliding_window": 13,
        "max_window_layers": 1,
    },
    "mistral-window": {"family": "mistral", "sliding_window": 17, "head_dim": 24},
    "mistral-no-window": {"family": "mistral", "sliding_window": None, "q_heads": 6, "kv_heads": 3, "hidden": 72},
    "gemma2-caps": {"family": "gemma2", "head_dim": 24, **GEMMA2, "final_logit_softcapping": 3.0},
    "gemma2-one-kv-head": {
        "family": "gemma2",
        "q_heads": 3,
        "kv_heads": 1,
        "hidden": 48,
        "layers": 3,
        **GEMMA2,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": None,
    },
    "gemma3-two-ropes": {
        "family": "gemma3_text",
        "layers": 3,
        **GEMMA3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma3-linear": {
        "family": "gemma3_text",
        "layers": 4,
        "hidden": 48,
        "q_heads": 3,
        "kv_heads": 3,
        "head_dim": 20,
        **GEMMA3,
        "sliding_window_pattern": 2,
        "final_logit_softcapping": 4.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 40000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
        },
    },
    "phi3-long": {
        "family": "phi3",
        "q_heads": 4,
        "kv_heads": 2,
        "rope_scaling": LONGROPE | {"partial_rotary_factor": 0.75},
        "original_max_position_embeddings": 24,
        "pad_token_id": 0,
        "tied": True,
    },
    "phi3-short": {
        "family": "phi3",
        "q_heads": 4,
        "kv_heads": 4,
        "rope_scaling": LONGROPE | {"partial_rotary_factor": 0.75},
        "original_max_position_embeddings": 256,
        "sliding_window": 19,
        "pad_token_id": 0,
    },
    "gpt_oss-sinks": {"family": "gpt_oss", "head_dim": 16, **GPT_OSS},
    "gpt_oss-yarn": {
        "family": "gpt_oss",
        "head_dim": 32,
        "q_heads": 6,
        "kv_heads": 2,
        "layers": 3,
        **GPT_OSS,
        "num_local_experts": 3,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen3_moe-some-dense": {
        "family": "qwen3_moe",
        "layers": 3,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "qwen3_moe-renormalised": {
        "family": "qwen3_moe",
        "head_dim": 24,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "tied": True,
    },
    "mixtral-window": {"family": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 15},
    "mixtral-one-of-three": {
        "family": "mixtral",
        "q_heads": 6,
        "kv_heads": 2,
        "hidden": 48,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "sliding_window": None,
    },
}
"""Name -> keywords of `tiny`: the shapes that every backend is compared with Hugging Face on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """A folder written by save_pretrained, and the same model in float32, eval mode, with eager attention."""

    path: Path
    hf: PreTrainedModel

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """float32[T, vocab] of one sequence, in one whole prefill."""
        with torch.no_grad():
            return self.hf(torch.tensor([tokens])).logits[0]

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The next `count` tokens, each the argmax of a whole prefill; no cache, no stop."""
        out = list(tokens)
        for _ in range(count):
            out.append(int(self.logits(out)[-1].argmax()))
        return out[len(tokens) :]


def tiny(
    path: Path,
    *,
    family: str = "llama",
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    ffn: int | None = None,
    vocab: int = 256,
    bias: bool = False,
    tied: bool = False,
    theta: float = 10000.0,
    norm_eps: float = 1e-3,
    rope_scaling: dict[str, Any] | None = None,
    max_len: int = 512,
    eos: int | list[int] | None = None,
    max_shard_size: str | None = None,
    **own: Any,
) -> Tiny:
    """Write a random model to the folder `path` (made if need be) as float32 safetensors.

    family: transformers' model_type. head_dim: default hidden / q_heads. ffn: default 2 * hidden + 8.
    norm_eps: so large that a wrong one shows.
    bias: on attention, and in Llama on the feed-forward too. rope_scaling: rope_type and its figures, without the base.
    max_shard_size: as save_pretrained has it. own: fields of the family's configuration.
    """
    fields: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn or 2 * hidden + 8,
        "num_hidden_layers": layers,
        "num_attention_heads": q_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // q_heads,
        "max_position_embeddings": max_len,
        "rms_norm_eps": norm_eps,
        "tie_word_embeddings": tied,
        "attention_bias": bias,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta} | (rope_scaling or {}),
        "bos_token_id": None,
        "eos_token_id": eos,
        "dtype": "float32",
    }
    if bias and family == "llama":
        fields["mlp_bias"] = True
    if family in ("gpt_oss",):
        fields["attention_bias"] = True
    if family == "gemma3_text":
        del fields["rope_parameters"]  # one for each kind of layer
    config = AutoConfig.for_model(family, **(fields | own))
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    fill(hf, seed)
    hf.save_pretrained(path, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    return Tiny(path=Path(path), hf=hf)


def fill(hf: PreTrainedModel, seed: int) -> None:
    """Honest random weights: every bias and norm matters, scores and logits have a standard deviation of 2 to 3.

    What the layers add outweighs the embedding, or a model with a tied head would only repeat its last token: in
    Gemma, whose embedding is as large as the rest, by the norms on what is added.
    """
    draw = torch.Generator().manual_seed(seed)
    width = hf.config.hidden_size
    gemma = hf.config.model_type.startswith("gemma")
    with torch.no_grad():
        for name, p in hf.named_parameters():
            noise = torch.randn(p.shape, generator=draw)
            if "norm" in name:
                large = 1.6 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
                if gemma and "post_" in name:
                    large = 3.0
                p.copy_(large * (1 + 0.2 * noise) - (1 if gemma else 0))
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif name.endswith("sinks"):
                p.copy_(2.0 + noise)
            elif "experts." in name:
                inner = p.shape[1] if hf.config.model_type == "gpt_oss" else p.shape[2]
                p.copy_(2.0 * inner**-0.5 * noise)
            elif "router" in name or name.endswith("mlp.gate.weight"):
                p.copy_(1.5 * width**-0.5 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                p.copy_(2.0 * width**-0.5 * noise)
            else:
                gain = 1.6 if "q_proj" in name or "k_proj" in name else 2.0
                p.copy_(gain * p.shape[1] ** -0.5 * noise)


def prompt(model: Tiny, length: int, seed: int = 0) -> list[int]:
    """Random token ids of the model's vocabulary."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(model.hf.config.vocab_size, (length,), generator=draw).tolist()


def assert_honest(model: Tiny) -> None:
    """A model that could hide a fault is no test: logits must have a standard deviation of 1 to 5, attention must
    neither look everywhere alike nor only at one place, in any layer."""
    with torch.no_grad():
        out = model.hf(torch.tensor([prompt(model, 48, seed=99)]), output_attentions=True)
    spread = float(out.logits.std(-1).mean())
    assert 1 <= spread <= 5, f"logits have a standard deviation of {spread:.2f}"
    for i, weights in enumerate(out.attentions):
        last = weights[0, :, 16:].double()
        entropy = -(last * last.clamp_min(1e-30).log()).sum(-1)
        share = float((entropy / torch.arange(17, 49).log()).mean())
        assert 0.15 <= share <= 0.85, f"layer {i}: attention has {share:.2f} of the entropy of a uniform one"
