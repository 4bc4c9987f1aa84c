"""Offline generation: fixed prompts in, a fixed number of greedy tokens out, beside a peer in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from engine.errors import ConfigError
from engine.model.registry import read_spec
from radixmesh.engine import Engine

SHAPES: dict[str, dict[str, int]] = {
    "25m": {"hidden": 384, "ffn": 1024, "layers": 8, "q_heads": 6, "kv_heads": 2, "vocab": 32000},
    "100m": {"hidden": 768, "ffn": 2048, "layers": 12, "q_heads": 12, "kv_heads": 4, "vocab": 32000},
}
"""Random Llamas with heads of 64 and tied embeddings, to be written as bfloat16 checkpoints."""

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Seconds are medians over repeats. first: until each prompt has one token; whole: until all have `made`.
    decode: tokens per second between the two; spread: (slowest - fastest) / median of `whole`."""

    subject: str
    batch: int
    first: float
    whole: float
    decode: float
    spread: float


def make_model(folder: Path, shape: str) -> Path:
    """Write a random bfloat16 Llama of a named shape. Needs torch. Raises ConfigError for an unknown name."""
    if shape not in SHAPES:
        raise ConfigError(f"shape: unknown {shape!r}; there are {', '.join(SHAPES)}", field="shape")
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    s = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=s["vocab"],
        hidden_size=s["hidden"],
        intermediate_size=s["ffn"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["q_heads"],
        num_key_value_heads=s["kv_heads"],
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / shape)
    return folder / shape


def prompts(batch: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """Random ids past the special ones, no two prompts alike."""
    return np.random.default_rng(seed).integers(min(256, vocab // 2), vocab, (batch, length)).tolist()


def measure(
    subject: str, run: Callable[[Prompts, int], None], batch: int, length: int, made: int, vocab: int, repeats: int
) -> Speed:
    """Time one token and then `made` tokens for fresh prompts, after a warm-up of each."""
    first, whole = [], []
    for i in range(repeats + 1):
        for count, times in ((1, first), (made, whole)):
            given = prompts(batch, length, vocab, seed=2 * i + (count > 1))
            start = time.perf_counter()
            run(given, count)
            times.append(time.perf_counter() - start)
    first, whole = first[1:], whole[1:]
    decode = [batch * (made - 1) / (w - f) for f, w in zip(first, whole, strict=True)]
    return Speed(
        subject=subject,
        batch=batch,
        first=median(first),
        whole=median(whole),
        decode=median(decode),
        spread=(max(whole) - min(whole)) / median(whole),
    )


def run_engine(engine: Engine) -> Callable[[Prompts, int], None]:
    """Our engine, through its public face."""

    def run(given: Prompts, count: int) -> None:
        params = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
        results: Any = engine.generate(token_ids=[list(p) for p in given], sampling_params=params)
        assert all(r["meta_info"]["completion_tokens"] == count for r in results)

    return run


def run_transformers(path: Path, dtype: str, threads: int) -> Callable[[Prompts, int], None]:
    """transformers' generate, static batch, its default attention and cache."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    assert model.dtype == getattr(torch, dtype)

    def run(given: Prompts, count: int) -> None:
        ids = torch.tensor(given)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape[1] == ids.shape[1] + count

    return run


def measure_subject(
    name: str,
    path: Path,
    batches: Sequence[int],
    length: int,
    made: int,
    repeats: int,
    threads: int,
    settings: Mapping[str, Any],
) -> list[Speed]:
    """Open a subject, a backend's name or "transformers", with a dtype behind a dash, and measure it at every batch
    size. A backend without one takes its own."""
    vocab = read_spec(path).vocab
    who, _, dtype = name.partition("-")
    if who == "transformers":
        run = run_transformers(path, dtype, threads)
        return [measure(name, run, batch, length, made, vocab, repeats) for batch in batches]
    with Engine(str(path), backend=who, dtype=dtype or "auto", skip_tokenizer=True, **settings) as engine:
        return [measure(name, run_engine(engine), batch, length, made, vocab, repeats) for batch in batches]
