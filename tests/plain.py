"""A small random Llama checkpoint, written with numpy alone: `make test-next` has no torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

DEMO = Path(__file__).parents[1] / "radixmesh" / "demo" / "config.json"
VOCAB, HIDDEN, FFN, HEAD = 97, 64, 96, 16


def plain(folder: Path) -> Path:
    """One layer of 4 query and 2 key-value heads, the head tied, float32; logits have a standard deviation of 3.5."""
    given = json.loads(DEMO.read_text())
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "head_dim": HEAD}
    config = given | sizes | {"num_hidden_layers": 1, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(7)
    q, kv = config["num_attention_heads"] * HEAD, config["num_key_value_heads"] * HEAD
    shapes = {
        "self_attn.q_proj": (q, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, q),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    tensors = {f"model.layers.0.{name}.weight": draw.normal(0, 2 / s[1] ** 0.5, s) for name, s in shapes.items()}
    norms = ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm")
    tensors |= {f"{name}.weight": draw.uniform(0.5, 1.5, HIDDEN) for name in norms}
    tensors["model.embed_tokens.weight"] = draw.normal(0, 0.4, (VOCAB, HIDDEN))
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def ids(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return [int(t) for t in np.random.default_rng(seed).integers(0, VOCAB, length)]
