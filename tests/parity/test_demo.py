"""The demo model through the engine: two backends, the same tokens; and nothing compiles after ready."""

from __future__ import annotations

import gc
import inspect
import json
import random
import resource
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from backends.api.choice import Choice
from backends.api.ties import admissible, first_difference
from engine.config import load
from engine.run.start import decide, open_device
from engine.text.tokenizer import Tokenizer
from radixmesh import Engine
from radixmesh.engine import DEMO
from radixmesh.parity.compare import compare
from radixmesh.parity.readings import read_backend

PROMPTS, MADE = 100, 64
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "min_p": 0.02}


def prompts() -> list[str]:
    """Beginnings of the standard library's own functions."""
    modules = [json, textwrap, random, inspect]
    sources = [inspect.getsource(f) for m in modules for _, f in inspect.getmembers(m, inspect.isfunction)]
    random.Random(0).shuffle(sources)
    texts = [source[: 20 + 7 * (i % 30)] for i, source in enumerate(sources * 3)]
    return texts[:PROMPTS]


@pytest.fixture(scope="module")
def engines() -> Iterator[list[Engine]]:
    """One engine a backend, in float32."""
    with Engine(backend="jax", dtype="float32") as left, Engine(backend="torch", dtype="float32") as right:
        yield [left, right]


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
def test_backends_give_the_same_tokens(engines: list[Engine], kind: str) -> None:
    """100 prompts, 64 tokens: equal, but for near-ties of Hugging Face's logits in at most 1 of 100."""
    common = {"max_new_tokens": MADE, "ignore_eos": True}
    chosen = {"temperature": 0.0} if kind == "greedy" else SAMPLED
    params = [common | chosen | {"seed": 1000 + i} for i in range(PROMPTS)]
    left, right = ([*e.generate(prompts(), sampling_params=params)] for e in engines)
    assert all(len(r["output_ids"]) == MADE for r in left)
    differ = [
        (i, at)
        for i, (a, b) in enumerate(zip(left, right, strict=True))
        if (at := first_difference(a["output_ids"], b["output_ids"])) is not None
    ]
    assert len(differ) <= PROMPTS // 100, f"{len(differ)} sequences differ"
    hf = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tokenizer = Tokenizer.open(DEMO)
    for i, at in differ:
        ids = [*tokenizer.encode(prompts()[i]), *left[i]["output_ids"][:at]]
        with torch.no_grad():
            logits = hf(torch.tensor([ids])).logits[0, -1].numpy()
        choice = Choice(seed=1000 + i, **chosen)
        for result in (left[i], right[i]):
            assert admissible(result["output_ids"][at], logits, choice, len(ids), measured()), (i, at)


def measured() -> float:
    """Largest difference of the two backends' logits on one prompt."""
    ids = Tokenizer.open(DEMO).encode(prompts()[0])
    readings = []
    for name in ("jax", "torch"):
        decided = decide(load(None, {"backend": name, "dtype": "float32", "sched.slots": 1}), DEMO)
        with closing(open_device(decided)) as backend:
            backend.load(decided.source())
            readings.append(read_backend(name, backend, decided.spec, ids, 1))
    return compare(*readings).gaps[-1].worst


def asked(rng: random.Random) -> dict[str, Any]:
    """What a request may ask of the sampler, at random."""
    allowed = rng.sample(range(6, 1600), 400)
    return {
        "max_new_tokens": rng.choice([0, 1, 5, 30]),
        "temperature": rng.choice([0.0, 0.9]),
        "top_k": rng.choice([-1, 20]),
        "top_p": rng.choice([1.0, 0.9]),
        "min_p": rng.choice([0.0, 0.1]),
        "repetition_penalty": rng.choice([1.0, 1.2]),
        "presence_penalty": rng.choice([0.0, 0.5]),
        "stop_token_ids": [rng.randrange(1600)],
        "n": rng.choice([1, 1, 1, 2]),
    } | rng.choice(
        [{}, {}, {"logit_bias": {str(allowed[0]): 4.0}}, {"allowed_token_ids": allowed}, {"ignore_eos": True}]
    )


def test_nothing_compiles_after_ready() -> None:
    """300 mixed requests on jax: lengths, sampling, masks, scores, forks, stops and aborts, and no compile."""
    rng = random.Random(7)
    small = {"sched.slots": 8, "sched.max_tokens": 64, "cache.tokens": 2048, "model.max_len": 512}
    with Engine(backend="jax", skip_tokenizer=True, **small) as engine:
        before = engine.status()
        for turn in range(15):
            ids = [[rng.randrange(6, 1600) for _ in range(rng.choice([1, 7, 16, 90, 300]))] for _ in range(20)]
            params = [asked(rng) for _ in ids]
            told = {"return_logprob": True, "top_logprobs_num": 3, "logprob_start_len": 0} if turn % 3 == 0 else {}
            results = engine.generate(token_ids=ids, sampling_params=params, **told)
            assert len(results) == sum(p["n"] for p in params)
            assert all(r["meta_info"]["finish_reason"]["type"] in ("length", "stop") for r in results)
            next(engine.stream(token_ids=ids[0], sampling_params=params[0] | {"n": 1, "max_new_tokens": 9})).keys()
        after = engine.status()
    assert before.ready
    assert after.programs == before.programs > 0
    assert after.compiles_after_ready == 0


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_memory_stays_flat_over_short_requests(backend: str) -> None:
    """10,000 requests of a few tokens, prefixes of all kinds: after the first 2,000 nothing grows by 8 MiB."""
    rng, sizes = random.Random(3), []
    settings = {"sched.slots": 64, "sched.max_tokens": 256, "cache.tokens": 4096, "model.max_len": 256}
    with Engine(backend=backend, skip_tokenizer=True, **settings) as engine:
        for _ in range(50):
            ids = [[rng.randrange(6, 60) for _ in range(rng.choice([1, 3, 17, 33]))] for _ in range(200)]
            engine.generate(token_ids=ids, sampling_params={"temperature": 0.0, "max_new_tokens": 2})
            gc.collect()
            sizes.append(resident())
    assert max(sizes[10:]) - sizes[9] < 8 << 20, [s >> 20 for s in sizes]


def test_output_reads_like_python(engines: list[Engine]) -> None:
    """Not noise: most of what the demo model writes are words that Python programs are made of."""
    texts = [
        engines[1].generate(p, sampling_params={"temperature": t, "seed": 5, "max_new_tokens": 60})["text"]
        for p in ("def read_file(path):\n", "class Parser:\n    def __init__(self")
        for t in (0.0, 0.7)
    ]
    for text in texts:
        assert "\n" in text
        assert np.mean([c.isascii() for c in text]) > 0.99
        assert any(word in text for word in ("self", "return", "def ", "if ", "raise")), text


def test_penalised_text_is_hugging_faces(engines: list[Engine]) -> None:
    """Through the scheduler, with steps in flight and a warm cache: the device counts what it makes."""
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32), Tokenizer.open(DEMO)
    asked = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}
    texts = prompts()[:4]
    want = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)])
        made = hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            min_new_tokens=24,
            repetition_penalty=1.3,
            pad_token_id=0,
        )
        want.append(made[0, ids.shape[1] :].tolist())
    for engine in engines:
        for _ in range(2):
            given = engine.generate(texts, sampling_params=asked | {"repetition_penalty": 1.3})
            assert [r["output_ids"] for r in given] == want
        plain = engine.generate(texts, sampling_params=asked)
        assert [r["output_ids"] for r in plain] != want
        assert engine.status().compiles_after_ready == 0
