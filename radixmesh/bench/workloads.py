"""Workloads by name, the same for every engine: token ids in and out, seeded, greedy, each answer of a fixed length."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from engine.errors import ConfigError
from radixmesh.engine import Engine

LOW, HIGH = 256, 31000
"""Of the random ids: plain ones in every model that is measured."""
LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "mlp_bias": False,
}
ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {  # Llama 3.1
        **LLAMA3,
        "rope_scaling": ROPE | {"factor": 8.0},
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "1b": {  # Llama 3.2
        **LLAMA3,
        "rope_scaling": ROPE | {"factor": 32.0},
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "30b-a3b": {  # Qwen3
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "wide": {  # small, with the heads of a large one
        **LLAMA3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 4096,
        "tie_word_embeddings": False,
    },
}
"""Shapes that are measured with random weights: config.json alone, no checkpoint on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """prompts: token ids; made: tokens of each answer."""

    prompts: Sequence[Sequence[int]]
    made: int


def throughput(n: int = 256, length: int = 1024, made: int = 256, high: int = HIGH) -> Workload:
    """Prompts that share nothing, all at once."""
    r = np.random.default_rng(0)
    return Workload(prompts=[r.integers(LOW, high, length).tolist() for _ in range(n)], made=made)


def shared(
    groups: int = 32, each: int = 8, prefix: int = 2048, own: int = 128, made: int = 128, high: int = HIGH
) -> Workload:
    """Groups of prompts that begin alike, group after group."""
    r = np.random.default_rng(1)
    prompts: list[list[int]] = []
    for _ in range(groups):
        begin = r.integers(LOW, high, prefix).tolist()
        prompts += [begin + r.integers(LOW, high, own).tolist() for _ in range(each)]
    return Workload(prompts=prompts, made=made)


def single(length: int = 128, made: int = 256, high: int = HIGH) -> Workload:
    """One prompt."""
    r = np.random.default_rng(2)
    return Workload(prompts=[r.integers(LOW, high, length).tolist()], made=made)


def workload(name: str, scale: float = 1.0, high: int = HIGH) -> Workload:
    """A workload by name; scale < 1 shrinks it for a dry run. high: past the largest id. Raises ConfigError."""

    def part(x: int) -> int:
        return max(1, int(x * scale))

    if not 0 < scale <= 1:
        raise ConfigError(f"scale: must be above 0 and at most 1, not {scale:g}", field="scale")
    if name == "throughput":
        return throughput(part(256), part(1024), part(256), high)
    if name == "shared":
        return shared(part(32), max(2, part(8)), part(2048), part(128), part(128), high)
    if name == "single":
        return single(part(128), part(256), high)
    raise ConfigError(f"workload: unknown {name!r}; there are single, throughput, shared", field="workload")


def make_config(folder: Path, shape: str) -> Path:
    """Write the config.json of a named shape, with no weights beside it. Raises ConfigError for an unknown name."""
    if shape not in SHAPES:
        raise ConfigError(f"shape: unknown {shape!r}; there are {', '.join(SHAPES)}", field="shape")
    config = {"hidden_act": "silu", "attention_bias": False, "torch_dtype": "bfloat16", **SHAPES[shape]}
    path = folder / shape
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    return path


def measure(
    path: Path, backend: str, names: Sequence[str], scale: float, repeats: int, settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Run workloads one after the other on one engine."""
    begun = time.perf_counter()
    with Engine(str(path), backend=backend, skip_tokenizer=True, **settings) as engine:
        ready = time.perf_counter() - begun
        high = min(HIGH, engine.spec.vocab)
        figures = [run(engine, workload(name, scale, high), repeats) | {"workload": name} for name in names]
        status = engine.status()
    same = {
        "subject": backend,
        "scale": scale,
        "device": status.device,
        "ready": ready,
        "programs": status.programs,
        "compiles_after_ready": status.compiles_after_ready,
        "memory": status.memory,
    }
    return [f | same for f in figures]


def run(engine: Engine, w: Workload, repeats: int) -> dict[str, Any]:
    """Run a workload `repeats` times after a short warm-up, each from an empty prefix cache.

    seconds: median until all answers are whole; spread: (slowest - fastest) / median. first, ms_per_token: of one
    answer alone, seconds until its first token and milliseconds for each after it. cached: prompt tokens that came from
    the cache. steps: of the last repeat.
    """
    params = {"temperature": 0, "max_new_tokens": w.made, "ignore_eos": True}
    prompts, alone = [list(p) for p in w.prompts], len(w.prompts) == 1
    engine.generate(token_ids=prompts, sampling_params={**params, "max_new_tokens": min(8, w.made)})
    seconds: list[float] = []
    firsts: list[float] = []
    cached = steps = 0
    for _ in range(repeats):
        engine.flush_cache()
        before, start = engine.steps, time.perf_counter()
        if alone:
            first, cached = _stream(engine, prompts[0], params, start)
            firsts.append(first)
        else:
            results: Any = engine.generate(token_ids=prompts, sampling_params=params)
            assert all(len(r["output_ids"]) == w.made for r in results)
            cached = sum(r["meta_info"]["cached_tokens"] for r in results)
        seconds.append(time.perf_counter() - start)
        steps = engine.steps - before
    whole, made = median(seconds), len(prompts) * w.made
    figures = {
        "requests": len(prompts),
        "input_tokens": sum(map(len, prompts)),
        "output_tokens": made,
        "repeats": repeats,
        "seconds": whole,
        "each": seconds,
        "spread": (max(seconds) - min(seconds)) / whole,
        "output_tokens_per_second": made / whole,
        "cached": cached,
        "steps": steps,
    }
    if alone and w.made > 1:
        figures["first"] = median(firsts)
        figures["ms_per_token"] = 1e3 * median((s - f) / (w.made - 1) for s, f in zip(seconds, firsts, strict=True))
    return figures


def _stream(engine: Engine, prompt: Sequence[int], params: Mapping[str, Any], start: float) -> tuple[float, int]:
    """Seconds until the first token, and the prompt's tokens from the cache."""
    answer = engine.stream(token_ids=list(prompt), sampling_params=params)
    last = next(answer)
    first = time.perf_counter() - start
    for more in answer:
        last = more
    assert len(last["output_ids"]) == params["max_new_tokens"]
    return first, int(last["meta_info"]["cached_tokens"])
