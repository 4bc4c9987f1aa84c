"""`backend.deterministic`: the demo model writes the same tokens alone, batched, cold, warm, in chunks of any size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from radixmesh import Engine

TEXTS = ("def fibonacci(n):\n", "class Stack:\n    def push(self", "import os\n\n\n" * 8, "x")
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0 if i % 2 else 0.9, "seed": i, "top_p": 0.95, "max_new_tokens": 12, "ignore_eos": True}
    for i in range(len(TEXTS))
]


@pytest.fixture
def threads() -> Iterator[None]:
    """One thread: the model is so small that threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_same_tokens_whatever_else_runs(backend: str) -> None:
    made = []
    for tokens in (64, 24):
        settings = {"deterministic": True, "sched.max_tokens": tokens, "cache.tokens": 2048, "max_len": 512}
        with Engine(backend=backend, **settings) as engine:
            alone = [engine.generate(t, sampling_params=p) for t, p in zip(TEXTS, PARAMS, strict=True)]
            batch = engine.generate(list(TEXTS), sampling_params=PARAMS)
            assert any(r["meta_info"]["cached_tokens"] for r in batch)
            made += [[r["output_ids"] for r in runs] for runs in (alone, batch)]
    assert made[1:] == made[:-1]
