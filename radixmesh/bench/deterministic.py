"""Deterministic mode: the same requests alone, in a batch, cold, warm and in chunks of another size; what is not the
same to the bit, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.model.registry import read_spec
from radixmesh.engine import Engine

SHARED, SHORT, LONG = 40, 8, 96
"""Tokens that a half of the prompts begin with, and the bounds of what each has of its own."""
CHUNK = 72
"""Tokens of a step, where prompts are to be cut elsewhere: no multiple of a page, at least a row of each request."""

Answer = tuple[Any, Any, Any]
"""Tokens, their logprobs, and those of the likeliest three."""


def prompts(count: int, vocab: int) -> list[list[int]]:
    """Random ids; every other prompt begins as the first."""
    rng, low = np.random.default_rng(0), min(256, vocab // 2)
    begin = rng.integers(low, vocab, SHARED).tolist()
    return [begin * (i % 2) + rng.integers(low, vocab, rng.integers(SHORT, LONG)).tolist() for i in range(count)]


def params(count: int, made: int) -> list[dict[str, Any]]:
    """Greedy and drawn in turns."""
    drawn = {"temperature": 0.9, "top_p": 0.95, "top_k": 50}
    same = {"max_new_tokens": made, "ignore_eos": True}
    return [same | (drawn if i % 4 > 1 else {"temperature": 0.0}) | {"seed": 1000 + i} for i in range(count)]


def measure(
    path: Path, backend: str, dtype: str, count: int, made: int, alone: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """One record. runs: of each way of running them, how many of so many answers had the tokens and the logprobs of the
    first run, all at once from an empty cache; seconds and tokens_per_second: of all at once, greedy, with the mode and
    without; ms_per_token: of one alone."""
    vocab = read_spec(path).vocab
    given, asked = prompts(count, vocab), params(count, made)
    few = list(range(0, count, max(1, count // alone)))[:alone]
    runs: dict[str, dict[int, Answer]] = {}
    cost: dict[str, dict[str, float]] = {}
    cached = 0

    def opened(exact: bool, **more: Any) -> Engine:
        mode = {"backend.deterministic": True} if exact else {}
        return Engine(str(path), backend=backend, dtype=dtype, skip_tokenizer=True, **{**settings, **mode, **more})

    def ask(engine: Engine, rows: Sequence[int]) -> dict[int, Answer]:
        nonlocal cached
        results: Any = engine.generate(
            token_ids=[given[i] for i in rows],
            sampling_params=[asked[i] for i in rows],
            return_logprob=True,
            top_logprobs_num=3,
        )
        cached = sum(r["meta_info"]["cached_tokens"] for r in results)
        names = ("output_token_logprobs", "output_top_logprobs")
        return {i: (r["output_ids"], *(r["meta_info"][n] for n in names)) for i, r in zip(rows, results, strict=True)}

    everything = range(count)
    with opened(True) as engine:
        device = engine.status().device
        runs["all at once, cold"] = ask(engine, everything)
        runs["all at once, warm"] = ask(engine, everything)
        warm = cached
        runs["alone, warm"] = {i: ask(engine, [i])[i] for i in few}
        runs["alone, cold"] = {}
        for i in few:
            engine.flush_cache()
            runs["alone, cold"] |= ask(engine, [i])
        cost["deterministic"] = _cost(engine, given, made)
    with opened(True, **{"sched.slots": min(count, CHUNK), "sched.max_tokens": CHUNK}) as engine:
        runs[f"all at once, cold, steps of {CHUNK} tokens"] = ask(engine, everything)
    with opened(False) as engine:
        cost["usual"] = _cost(engine, given, made)
    first = next(iter(runs.values()))
    same = {name: told(first, found) for name, found in list(runs.items())[1:]}
    return {
        "dtype": dtype,
        "backend": backend,
        "device": device,
        "requests": count,
        "made": made,
        "prompt_tokens": sum(map(len, given)),
        "cached_warm": warm,
        "equal": all(r["tokens"] == r["logprobs"] == r["of"] for r in same.values()),
        "runs": same,
        "cost": cost,
    }


def told(first: Mapping[int, Answer], found: Mapping[int, Answer]) -> dict[str, int]:
    """How many of those found are as in the first run: their tokens, and every bit of their logprobs."""
    return {
        "of": len(found),
        "tokens": sum(a[0] == first[i][0] for i, a in found.items()),
        "logprobs": sum(a[1:] == first[i][1:] for i, a in found.items()),
    }


def _cost(engine: Engine, given: Sequence[Sequence[int]], made: int) -> dict[str, float]:
    """Of the prompts at once from an empty cache, and of the first alone once it is cached; no logprobs."""
    greedy = {"temperature": 0, "max_new_tokens": made, "ignore_eos": True}
    engine.generate(token_ids=[list(given[0])], sampling_params=greedy)
    start = time.perf_counter()
    engine.generate(token_ids=[list(given[0])], sampling_params=greedy)
    alone = time.perf_counter() - start
    engine.flush_cache()
    start = time.perf_counter()
    engine.generate(token_ids=[list(p) for p in given], sampling_params=greedy)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens_per_second": len(given) * made / seconds, "ms_per_token": 1e3 * alone / made}
