"""One request after the other on every backend: the same tokens and logprobs, and nothing compiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from radixmesh.engine import Engine
from tests.text.made import byte_level
from tests.tiny import tiny

SMALL = {"slots": 4, "cache_tokens": 512, "max_tokens": 16, "page": 4, "token_buckets": [16], "dtype": "float32"}
PARAMS: dict[str, Any] = {"temperature": 0.9, "seed": 5, "max_new_tokens": 8, "ignore_eos": True}
ASKED: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 0.4, "presence_penalty": -1.5, "frequency_penalty": 0.5},
    {"logit_bias": {"70": 5, "71": -100}},
    {"allowed_token_ids": list(range(60, 200))},
    {"min_new_tokens": 5, "stop_token_ids": list(range(60, 120)), "logit_bias": {"70": 60}},
    {"bad_words": ["the", "quick brown", "def f"]},
    {"max_new_tokens": 0},
    {"n": 3},
)


def test_every_backend_does_the_same(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tiny(tmp_path, vocab=len(tokenizer), max_len=128, eos=tokenizer.eos_token_id)
    tokenizer.save_pretrained(tmp_path)
    prompt = tokenizer.encode("over the lazy dog , or can he ? it 's what they 've said .")
    told: dict[str, list[Any]] = {}
    for backend in ("reference", "jax", "torch"):
        with Engine(tmp_path, backend=backend, **SMALL) as engine:
            for asked in ASKED:
                score = {"return_logprob": True, "logprob_start_len": 3, "top_logprobs_num": 2}
                results = engine.generate(token_ids=[prompt], sampling_params=PARAMS | asked, **score)
                told.setdefault(backend, []).append(results)
            assert engine.status().compiles_after_ready == 0, backend
    early = told["reference"][4][0]["output_ids"]
    assert (len(early), early[-1]) == (6, 70)
    for backend in ("jax", "torch"):
        for asked, mine, wanted in zip(ASKED, told[backend], told["reference"], strict=True):
            for a, b in zip(mine, wanted, strict=True):
                assert a["output_ids"] == b["output_ids"], (backend, asked)
                for name in ("input_token_logprobs", "output_token_logprobs"):
                    x, y = ([p for p, _, _ in r["meta_info"][name] if p is not None] for r in (a, b))
                    assert np.allclose(x, y, atol=2e-4), (backend, asked, name)
                for name in ("input_top_logprobs", "output_top_logprobs"):
                    x, y = ([[t for _, t, _ in top] for top in r["meta_info"][name] if top] for r in (a, b))
                    assert x == y, (backend, asked, name)
