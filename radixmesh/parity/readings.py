"""What each subject computes of one prompt: inner values, logits, greedy tokens. All float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends import open_backend
from backends.api.build import Host
from backends.api.protocol import Backend
from backends.api.step import F32
from backends.api.ties import margin
from engine.errors import ConfigError
from engine.model.checkpoint import Checkpoint
from engine.model.spec import ModelSpec
from engine.run.start import Decided

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
    name: str, backend: Backend, spec: ModelSpec, prompt: Sequence[int], count: int, chunk: int = 0
) -> Reading:
    """Feed the prompt in steps of `chunk` tokens, or as many as one holds, then make `count` greedy tokens, all by the
    contract alone. The backend has weights and no slot in use."""
    host = Host(backend, taps=names(spec))
    text, size = host.open(), chunk or backend.limits.max_tokens
    parts = []
    for i in range(0, len(prompt), size):
        result = host.run([(text, host.row(text, prompt[i : i + size], output=int(i + size >= len(prompt))))])
        parts.append(result.taps)
    values = {value: np.concatenate([part[value] for part in parts]) for value in names(spec)}
    tokens, margins = [int(result.tokens[0, 0])], [margin(values["logits"][-1])]
    for _ in range(count - 1):
        result = host.run([(text, host.row(text, [-1]))])
        tokens.append(int(result.tokens[0, 0]))
        margins.append(margin(result.taps["logits"][0]))
    return Reading(name=name, values=values, tokens=tokens, margins=margins)


def read_model(decided: Decided, prompt: Sequence[int], count: int) -> Reading:
    """What a backend, opened as was decided, computes of a prompt with the checkpoint's weights."""
    name = decided.resolved.backend
    backend = open_backend(name, decided.spec, decided.resolved)
    try:
        backend.load(Checkpoint(decided.path, decided.spec))
        return read_backend(name, backend, decided.spec, prompt, count)
    finally:
        backend.close()


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
    _pin(model, spec)
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


def _pin(model: Any, spec: ModelSpec) -> None:
    """Give the oracle's rope the one length that the engine's has (docs/decisions/0007-what-fixes-a-rope.md).

    transformers chooses dynamic and longrope frequencies anew for each sequence, by its length so far; keys already
    cached stay as they were. Both are computed by transformers all the same.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotary = model.model.rotary_emb
    for rope in {layer.mixer.rope for layer in spec.layers}:
        if rope is not None and rope.kind in ("dynamic", "longrope"):
            frequencies, _ = ROPE_INIT_FUNCTIONS[rope.kind](model.config, seq_len=rope.reach)
            rotary.inv_freq.copy_(frequencies)
            rotary.original_inv_freq.copy_(frequencies)
            rotary.long_inv_freq = frequencies
            rotary.max_seq_len_cached, rotary.original_max_seq_len = rope.reach, 0
