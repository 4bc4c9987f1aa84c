"""`backend.deterministic`: the demo model writes the same tokens alone, batched, cold, warm, in chunks of any size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backends import open_backend
from backends.api.build import Host
from engine.config import load
from engine.model.checkpoint import Checkpoint
from engine.run.start import decide
from radixmesh import Engine
from tests.tiny import SHAPES, prompt, tiny

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
    """And logprobs, to the bit: of the answers, and of the prompts when they are scored."""
    made, scored = [], []
    told, whole = {"return_logprob": True, "top_logprobs_num": 3}, {"return_logprob": True, "logprob_start_len": 0}
    for tokens in (64, 24):
        settings = {"deterministic": True, "sched.max_tokens": tokens, "cache.tokens": 2048, "max_len": 512}
        with Engine(backend=backend, **settings) as engine:
            alone = [engine.generate(t, sampling_params=p, **told) for t, p in zip(TEXTS, PARAMS, strict=True)]
            batch = engine.generate(list(TEXTS), sampling_params=PARAMS, **told)
            assert any(r["meta_info"]["cached_tokens"] for r in batch)
            names = ("output_token_logprobs", "output_top_logprobs")
            made += [[(r["output_ids"], *(r["meta_info"][n] for n in names)) for r in runs] for runs in (alone, batch)]
            one = {"max_new_tokens": 0}
            scored.append([engine.generate(t, sampling_params=one, **whole) for t in TEXTS])
            scored.append(engine.generate(list(TEXTS), sampling_params=one, **whole))
    assert made[0][0][1]
    assert made[1:] == made[:-1]
    given = [[r["meta_info"]["input_token_logprobs"] for r in runs] for runs in scored]
    assert len(given[0][0]) > 1
    assert given[1:] == given[:-1]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("backend", "shape"),
    [("torch", "gemma2-caps"), ("torch", "gpt_oss-sinks"), ("torch", "mixtral-window"), ("jax", "gpt_oss-sinks")],
)
def test_the_same_values_with_caps_sinks_windows_and_experts(backend: str, shape: str, tmp_path: Path) -> None:
    """To the bit, alone and beside others; and they are those of Hugging Face."""
    model = tiny(tmp_path, **SHAPES[shape])
    steps = {"backend.deterministic": True, "sched.slots": 4, "sched.max_tokens": 64, "cache.page": 8}
    asked = {"model": str(tmp_path), "backend": backend, "dtype": "float32", "model.max_len": 64}
    decided = decide(load(None, steps | asked), tmp_path)
    device = open_backend(backend, decided.spec, decided.resolved)
    device.load(Checkpoint(tmp_path, decided.spec))
    host = Host(device, taps=("logits",))
    tokens, others = prompt(model, 40), [prompt(model, n, seed=n) for n in (3, 10)]  # the tiles are cut elsewhere
    slot = host.open()
    alone = host.run([(slot, host.row(slot, tokens, output=1))]).taps["logits"]
    seen = [host.open() for _ in others]
    slot = host.open()
    rows = [(s, host.row(s, text, output=1)) for s, text in zip(seen, others, strict=True)]
    beside = host.run([*rows, (slot, host.row(slot, tokens, output=1))]).taps["logits"][-len(tokens) :]
    np.testing.assert_array_equal(alone, beside)
    np.testing.assert_allclose(alone, model.logits(tokens).numpy(), rtol=0, atol=4e-4)
    device.close()
