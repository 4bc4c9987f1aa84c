"""What each subject computes of one prompt: inner values, logits, greedy tokens. All float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from backends.api.build import Host
from backends.api.protocol import Backend
from backends.api.step import F32, I32
from backends.api.ties import margin
from engine.errors import ConfigError, ModelError
from engine.model import orbax
from engine.model.spec import ModelSpec
from radixmesh.parity import routing
from radixmesh.parity.subjects import ORACLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """values: name -> float32[prompt, ...], in the order of computation, "logits" last. tokens: greedy continuation;
    margins: distance of the two best logits at each of them. routing: "layers.i.routing" -> experts of each token of
    the prompt, int32[prompt, k], where a layer has experts and the subject tells them."""

    name: str
    values: dict[str, F32]
    tokens: list[int]
    margins: list[float]
    routing: dict[str, I32] = field(default_factory=dict)


def names(spec: ModelSpec) -> tuple[str, ...]:
    """The inner values that are compared, in the order of computation."""
    layers = [f"layers.{i}{part}" for i in range(len(spec.layers)) for part in (".attention", ".mlp", "")]
    return ("embed", *layers, "final_norm", "logits")


def read_backend(
    name: str, backend: Backend, spec: ModelSpec, prompt: Sequence[int], count: int, chunk: int = 0
) -> Reading:
    """Feed the prompt in steps of `chunk` tokens, or as many as one holds, then make `count` greedy tokens, all by the
    contract alone. The backend has weights and no slot in use."""
    wanted = names(spec)
    host = Host(backend, taps=(*wanted, *routing.taps(spec)))
    text, size = host.open(), chunk or backend.limits.max_tokens
    parts = []
    for i in range(0, len(prompt), size):
        result = host.run([(text, host.row(text, prompt[i : i + size], output=int(i + size >= len(prompt))))])
        parts.append(result.taps)
    values = {value: np.concatenate([part[value] for part in parts]) for value in host.taps if value in parts[0]}
    experts = {value: values.pop(value).astype(np.int32) for value in routing.taps(spec) if value in values}
    tokens, margins = [int(result.tokens[0, 0])], [margin(values["logits"][-1])]
    for _ in range(count - 1):
        result = host.run([(text, host.row(text, [-1]))])
        tokens.append(int(result.tokens[0, 0]))
        margins.append(margin(result.taps["logits"][0]))
    return Reading(name=name, values={n: values[n] for n in wanted}, tokens=tokens, margins=margins, routing=experts)


def open_oracle(path: Path, dtype: str = "float32") -> Any:
    """Hugging Face's model, eager attention, on the CPU. Raises ConfigError without torch, ModelError when the library
    loads another dtype than was asked for: a reference silently in bfloat16 makes every comparison green."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError as missing:
        raise ConfigError(
            "parity: Hugging Face as a judge needs torch: pip install 'radixmesh[torch]'", field="backends"
        ) from missing
    if orbax.holds(path):
        raise ModelError(
            f"parity: {path} is an Orbax checkpoint, which Hugging Face can't read: leave hf out, or "
            "`radixmesh convert --to safetensors` it",
            field="backends",
        )
    asked = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=asked, attn_implementation="eager").eval()
    wrong = sorted({str(p.dtype) for p in model.parameters()} - {str(asked)})
    if wrong:
        raise ModelError(f"parity: transformers loaded {', '.join(wrong)} where {dtype} was asked for", field="dtype")
    return model


def read_oracle(spec: ModelSpec, path: Path, prompt: Sequence[int], count: int) -> Reading:
    """Hugging Face transformers in float32 as the judge of one prompt."""
    return ask_oracle(open_oracle(path), spec, prompt, count)


def ask_oracle(
    model: Any,
    spec: ModelSpec,
    prompt: Sequence[int],
    count: int,
    *,
    name: str = ORACLE,
    pinned: Mapping[str, I32] | None = None,
) -> Reading:
    """What Hugging Face's model computes. pinned: experts to take for the prompt, as in Reading.routing."""
    import torch

    _pin(model, spec)
    values: dict[str, F32] = {}

    def keep(label: str) -> Any:
        def hook(module: Any, given: Any, out: Any) -> None:
            x = out[0] if isinstance(out, tuple) else out
            values[label] = x[0].float().numpy().copy()

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
        with routing.routed(model, pinned) as experts:
            out = model(torch.tensor([list(prompt)]), use_cache=True)
        for hook in hooks:
            hook.remove()
        values["logits"] = out.logits[0].float().numpy().copy()
        tokens, margins = [], []
        for _ in range(count):
            logits = out.logits[0, -1].float().numpy()
            tokens.append(int(logits.argmax()))
            margins.append(margin(logits))
            out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    ordered = {n: values[n] for n in names(spec)}
    return Reading(name=name, values=ordered, tokens=tokens, margins=margins, routing=experts)


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
