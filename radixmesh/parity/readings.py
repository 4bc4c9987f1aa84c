"""What each subject computes of one prompt: inner values, logits, greedy tokens. All float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends import open_backend
from backends.api.build import Host
from backends.api.step import F32
from backends.api.ties import margin
from engine.config import Resolved
from engine.errors import ConfigError
from engine.model.spec import ModelSpec
from engine.model.weights import WeightSource

ORACLE = "hf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """values: name -> float32[prompt, ...], in the order of computation, "logits" last. tokens: greedy continuation;
    margins: distance of the two best logits at each of them."""

    name: str
    values: dict[str, F32]
    tokens: list[int]
    margins: list[float]


def names(spec: ModelSpec) -> tuple[str, ...]:
    """The inner values that are compared, in the order of computation."""
    layers = [f"layers.{i}{part}" for i in range(len(spec.layers)) for part in (".attention", ".mlp", "")]
    return ("embed", *layers, "final_norm", "logits")


def read_backend(
    spec: ModelSpec, config: Resolved, weights: WeightSource, prompt: Sequence[int], count: int
) -> Reading:
    """Feed the prompt in steps of at most config.max_tokens, then make `count` greedy tokens, by the contract alone."""
    backend = open_backend(config.backend, spec, config)
    try:
        backend.load(weights)
        host = Host(backend, taps=names(spec))
        text, size = host.open(), config.max_tokens
        chunks = [prompt[i : i + size] for i in range(0, len(prompt), size)]
        parts = []
        for i, chunk in enumerate(chunks):
            result = host.run([(text, host.row(text, chunk, output=int(i == len(chunks) - 1)))])
            parts.append(result.taps)
        values = {name: np.concatenate([part[name] for part in parts]) for name in names(spec)}
        tokens, margins = [int(result.tokens[0, 0])], [margin(values["logits"][-1])]
        for _ in range(count - 1):
            result = host.run([(text, host.row(text, [-1]))])
            tokens.append(int(result.tokens[0, 0]))
            margins.append(margin(result.taps["logits"][0]))
    finally:
        backend.close()
    return Reading(name=config.backend, values=values, tokens=tokens, margins=margins)


def read_oracle(spec: ModelSpec, path: Path, prompt: Sequence[int], count: int) -> Reading:
    """Hugging Face transformers, float32, eager attention, on the CPU. Raises ConfigError without torch."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError as missing:
        raise ConfigError(
            "parity: Hugging Face as a judge needs torch: pip install 'radixmesh[torch]'", field="backends"
        ) from missing
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    wrong = {str(p.dtype) for p in model.parameters()} - {"torch.float32"}
    assert not wrong, f"the reference holds {wrong}, not float32"
    values: dict[str, F32] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, given: Any, out: Any) -> None:
            x = out[0] if isinstance(out, tuple) else out
            values[name] = x[0].numpy().copy()

        return hook

    base = model.model
    hooks = [
        base.embed_tokens.register_forward_hook(keep("embed")),
        base.norm.register_forward_hook(keep("final_norm")),
    ]
    for i, layer in enumerate(base.layers):
        hooks.append(layer.self_attn.register_forward_hook(keep(f"layers.{i}.attention")))
        hooks.append(layer.mlp.register_forward_hook(keep(f"layers.{i}.mlp")))
        hooks.append(layer.register_forward_hook(keep(f"layers.{i}")))
    with torch.inference_mode():
        out = model(torch.tensor([list(prompt)]), use_cache=True)
        for hook in hooks:
            hook.remove()
        values["logits"] = out.logits[0].numpy().copy()
        tokens, margins = [], []
        for _ in range(count):
            logits = out.logits[0, -1].numpy()
            tokens.append(int(logits.argmax()))
            margins.append(margin(logits))
            out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    return Reading(name=ORACLE, values={n: values[n] for n in names(spec)}, tokens=tokens, margins=margins)
