"""Experts of a Hugging Face model: which they are, and that another choice may be pinned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from radixmesh.parity.routing import changed, routed, routers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
}
CONFIGS: dict[str, Any] = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24, norm_topk_prob=False, head_dim=16),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=4, head_dim=16),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return made.eval()


@torch.no_grad()
def test_pinned_experts_are_taken(model: Any) -> None:
    tokens = torch.arange(12)[None] * 5 % 64
    with routed(model) as chosen:
        free = model(tokens).logits
    own = {name: value.copy() for name, value in chosen.items()}
    assert set(own) == {"layers.0.routing", "layers.1.routing"} == {f"layers.{i}.routing" for i in routers(model)}
    assert all(v.shape == (12, 2) for v in own.values())
    with routed(model, own):
        again = model(tokens).logits
    torch.testing.assert_close(again, free, rtol=0, atol=1e-5)  # its own choice changes nothing

    other = {name: value.copy() for name, value in own.items()}
    other["layers.1.routing"][7] = [e for e in range(4) if e not in own["layers.1.routing"][7]]
    with routed(model, other) as taken:
        pinned = model(tokens).logits
    assert (taken["layers.1.routing"] == other["layers.1.routing"]).all()
    gap = (pinned - free).abs().amax(-1)[0]
    assert gap[:7].max() < 1e-5 < 1e-2 < gap[7]  # only where another expert was pinned: it is the last layer
    torch.testing.assert_close(model(tokens).logits, free)  # and nothing stays hooked


def test_changed_counts_tokens_whatever_the_order() -> None:
    a = {"layers.0.routing": np.array([[0, 1], [2, 3], [1, 2], [0, 3]]), "layers.1.routing": np.zeros((4, 1))}
    b = {"layers.0.routing": np.array([[1, 0], [2, 0], [1, 2], [0, 3]])}
    assert changed(a, b) == {"layers.0.routing": 0.25}
