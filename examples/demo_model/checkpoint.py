"""The trained model in the files that Hugging Face's LlamaForCausalLM reads."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from model import Shape
from safetensors.numpy import save_file
from tokenizer import BEGIN, END, PAD, SPECIAL

WEIGHTS = "model.safetensors"
IDS = {"bos_token_id": SPECIAL.index(BEGIN), "eos_token_id": SPECIAL.index(END), "pad_token_id": SPECIAL.index(PAD)}
GENERATION = {**IDS, "do_sample": True, "temperature": 0.7, "top_p": 0.9}


def names(weights: nnx.State) -> dict[str, nnx.Variable]:
    """Parameters by their Hugging Face name."""
    return {"model." + ".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(weights)}


def config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.epsilon,
        "rope_theta": shape.rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        **IDS,
        "use_cache": True,
        "dtype": "bfloat16",
    }


def save(folder: Path, weights: nnx.State, shape: Shape) -> str:
    """Write weights once (no output matrix beside the tied embedding) and configs; returns the weights' sha256."""
    tensors = {name: np.asarray(leaf[...].astype(jnp.bfloat16)) for name, leaf in names(weights).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # save_file leaves it to its owner alone
    files = {
        "config.json": config(shape),
        "generation_config.json": GENERATION,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
