"""The real scheduler and cache over the numpy reference: whatever the batch, each request gets what it gets alone.

In float64, so that no near-tie may excuse a difference.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from backends.reference.backend import ReferenceBackend
from engine.config import Resolved
from engine.model.checkpoint import Checkpoint
from engine.model.registry import read_spec
from engine.run.loop import Loop
from engine.run.messages import Submit
from engine.sampling import SamplingParams
from engine.sched.request import Output, Request
from engine.sched.scheduler import Scheduler
from tests.simulation.trial import balance
from tests.tiny import tiny

MAX_LEN = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("model"), hidden=32, q_heads=4, kv_heads=2, layers=2, vocab=96).path


def serve(model: Path, requests: Sequence[Request], config: Resolved, rng: random.Random) -> dict[str, list[int]]:
    """All requests through one engine, arriving at random turns."""
    spec = read_spec(model)
    backend = ReferenceBackend(spec, config)
    backend.load(Checkpoint(model, spec))
    scheduler = Scheduler(backend.limits, policy=config.policy, radix=config.radix, least=8)
    got: dict[str, list[int]] = defaultdict(list)

    def emit(outputs: Sequence[Output]) -> None:
        for output in outputs:
            assert output.error is None, output
            got[output.rid] += output.tokens

    loop, todo = Loop(scheduler, backend, emit), list(requests)
    while todo or loop.busy:
        while todo and rng.random() < 0.6:
            loop.take([Submit(request=todo.pop(0))])
        loop.turn()
        balance(scheduler, 0)
    return got


def make(rng: random.Random, count: int) -> list[Request]:
    prefix = [rng.randrange(96) for _ in range(24)]
    requests = []
    for i in range(count):
        params = SamplingParams(
            max_new_tokens=rng.randrange(1, 12),
            temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
            top_k=rng.choice([-1, 5, 40]),
            top_p=rng.choice([1.0, 0.8]),
            min_p=rng.choice([0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            frequency_penalty=rng.choice([0.0, 0.5]),
        )
        tokens = prefix[: rng.randrange(24)] + [rng.randrange(96) for _ in range(rng.randrange(1, 16))]
        for j in range(rng.choice([1, 1, 3])):
            seed, group = rng.randrange(2**64), f"g{i}"
            requests.append(Request(rid=f"r{i}.{j}", tokens=tuple(tokens), params=params, seed=seed, group=group))
    return requests


@pytest.mark.parametrize("seed", range(6))
def test_batched_equals_alone(model: Path, seed: int) -> None:
    rng = random.Random(seed)
    requests = make(rng, 10)
    page, rows = rng.choice([1, 4, 8]), rng.choice([2, 4])
    need = MAX_LEN // page
    config = Resolved(
        backend="reference",
        platform="cpu",
        dtype="float64",
        cache_dtype="float32",
        max_len=MAX_LEN,
        pages=(rng.choice([need, need * 2, need * 6]),),
        page=page,
        slots=4,
        max_rows=rows,
        max_tokens=rng.choice([4, 9, 64]),
        token_buckets=(),
        depth=rng.choice([1, 2, 3]),
        policy=rng.choice(["lpm", "fcfs", "dfs-weight"]),
    )
    together = serve(model, requests, config, rng)
    alone = Resolved(
        backend="reference",
        platform="cpu",
        dtype="float64",
        cache_dtype="float32",
        max_len=MAX_LEN,
        pages=(need,),
        page=page,
        slots=1,
        max_rows=1,
        max_tokens=MAX_LEN,
        token_buckets=(),
        depth=1,
        radix=False,
    )
    for request in requests:
        assert serve(model, [request], alone, rng)[request.rid] == together[request.rid]
