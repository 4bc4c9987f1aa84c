"""Requests that begin alike, with the prefix cache on and off, in one run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from engine.model.registry import read_spec
from radixmesh.engine import Engine


def prompts(requests: int, shared: int, own: int, vocab: int, seed: int) -> list[list[int]]:
    """`requests` prompts of shared + own random ids; the first `shared` are the same for all."""
    rng, low = np.random.default_rng(seed), min(256, vocab // 2)
    prefix = rng.integers(low, vocab, shared).tolist()
    return [prefix + rng.integers(low, vocab, own).tolist() for _ in range(requests)]


def measure(
    path: Path,
    backend: str,
    radix: bool,
    requests: int,
    shared: int,
    own: int,
    made: int,
    repeats: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Seconds until all requests, submitted together, have `made` greedy tokens. A fresh prefix for each repeat, so
    that nothing is cached when it starts; cached: prompt tokens that came from the cache all the same."""
    vocab, times, cached = read_spec(path).vocab, [], 0
    params = {"temperature": 0, "max_new_tokens": made, "ignore_eos": True}
    with Engine(str(path), backend=backend, skip_tokenizer=True, radix=radix, **settings) as engine:
        engine.generate(token_ids=prompts(2, 64, own, vocab, seed=0), sampling_params=params)
        for i in range(repeats):
            given = prompts(requests, shared, own, vocab, seed=1 + i)
            start = time.perf_counter()
            results: Any = engine.generate(token_ids=given, sampling_params=params)
            times.append(time.perf_counter() - start)
            cached = sum(r["meta_info"]["cached_tokens"] for r in results)
    return {
        "subject": backend,
        "radix": radix,
        "seconds": median(times),
        "spread": (max(times) - min(times)) / median(times),
        "cached": cached,
        "prompt_tokens": requests * (shared + own),
        "requests": requests,
        "shared": shared,
        "own": own,
        "out": made,
    }
