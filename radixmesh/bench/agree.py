"""The same prompts through two backends on one machine: do they write the same tokens?"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from backends.api.ties import first_difference
from radixmesh.engine import Engine

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "min_p": 0.02},
}


def agree(path: str, names: list[str], count: int, made: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """count prompts of 8 to 200 random ids, `made` tokens each, in float32. One record a kind of sampling: sequences
    that are equal, the first difference of each that is not, and seconds by backend."""
    rng = np.random.default_rng(0)
    outputs: dict[str, dict[str, list[list[int]]]] = {}
    seconds: dict[str, dict[str, float]] = {}
    devices: dict[str, str] = {}
    prompts: list[list[int]] = []
    for name in names:
        with Engine(path, backend=name, dtype="float32", skip_tokenizer=True, **settings) as engine:
            prompts = prompts or [
                rng.integers(0, engine.spec.vocab, rng.integers(8, 200)).tolist() for _ in range(count)
            ]
            devices[name] = engine.status().device
            for kind, chosen in KINDS.items():
                asked = {"max_new_tokens": made, "ignore_eos": True} | chosen
                start = time.perf_counter()
                results: Any = engine.generate(
                    token_ids=prompts, sampling_params=[asked | {"seed": 1000 + i} for i in range(count)]
                )
                seconds.setdefault(kind, {})[name] = time.perf_counter() - start
                outputs.setdefault(kind, {})[name] = [r["output_ids"] for r in results]
            assert engine.status().compiles_after_ready == 0
    left, right = names
    figures = []
    for kind, made_by in outputs.items():
        ends = [first_difference(a, b) for a, b in zip(made_by[left], made_by[right], strict=True)]
        differ = [[i, at] for i, at in enumerate(ends) if at is not None]
        figures.append(
            {
                "kind": kind,
                "prompts": count,
                "tokens": made,
                "equal": count - len(differ),
                "differ": differ,
                "devices": devices,
                "seconds": seconds[kind],
            }
        )
    return figures
