"""Serves random requests on a GPU that is only pretended: run as a program, with a seed and names of CASES. Prints a
line for each kernel that was compiled after a backend was ready and each request that failed, then "done". FAULT in the
environment: one of FAULTS."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch

from backends import open_backend
from backends.torch import step, warmup
from engine.config import Resolved
from engine.model.groups import cache_groups
from engine.model.spec import Attention, Experts, Layer, Mlp, ModelSpec, Rope
from engine.model.weights import RandomWeights
from engine.run.loop import Loop
from engine.sampling import SamplingParams
from engine.sched.request import Request
from engine.sched.scheduler import Scheduler
from tests.backends import pretended

_ATTENTION = Attention(q_heads=8, kv_heads=2, head_dim=64, rope=Rope(dim=64, theta=10000.0), scale=0.125)
_FEED = Mlp(size=512)
SPEC = ModelSpec(
    family="pretended",
    vocab=1000,
    hidden=256,
    layers=(Layer(mixer=_ATTENTION, feed=_FEED), Layer(mixer=_ATTENTION, feed=_FEED)),
    norm_eps=1e-6,
    tied=False,
    max_len=4096,
    dtype="bfloat16",
)
SAMPLE = step.sample
EXPERTS = Experts(count=8, top_k=2, size=128, renormalised=True)


def feeds(*given: Any) -> tuple[Layer, ...]:
    return tuple(replace(layer, feed=feed) for layer, feed in zip(SPEC.layers, given, strict=True))


def mixers(**given: Any) -> tuple[Layer, ...]:
    return (replace(SPEC.layers[0], mixer=replace(_ATTENTION, **given)), SPEC.layers[1])


CASES: dict[str, tuple[ModelSpec, dict[str, Any]]] = {
    "plain": (SPEC, {}),
    "shared": (SPEC, {"cascade": "on"}),
    "narrow": (SPEC, {"quantise": "fp8", "activations": "fp8", "cache_dtype": "fp8"}),
    "int8": (replace(SPEC, layers=mixers(qk_norm=True)), {"quantise": "int8", "cache_dtype": "int8"}),
    "experts": (replace(SPEC, layers=feeds(EXPERTS, replace(EXPERTS, act="clamped", bias=True))), {}),
    "odd": (replace(SPEC, vocab=999, layers=mixers(window=300, sinks=True, bias=True)), {"max_rows": 20}),
    "exact": (SPEC, {"deterministic": True, "max_len": 256}),
    "exact, a window": (replace(SPEC, layers=mixers(window=100)), {"deterministic": True, "max_len": 256}),
    "none captured": (SPEC, {"graphs": ""}),
    "narrow, none captured": (SPEC, {"graphs": "", "quantise": "fp8-row"}),
    "experts, none captured": (replace(SPEC, layers=feeds(EXPERTS, _FEED)), {"graphs": "", "quantise": "int8"}),
}


def _kept(fed: Any, *rest: Any) -> Any:
    """A choice of tokens that sends a number along."""
    return torch.tensor(0).to(fed.after.device) + 0, SAMPLE(fed, *rest)


FAULTS: dict[str, Callable[[], None]] = {
    "rows": lambda: setattr(warmup, "ROWS", ()),
    "waits": lambda: setattr(step, "count", lambda counts, wishes, tokens: tokens.tolist()),
    "captured": lambda: setattr(step, "sample", lambda *given: _kept(*given)[1]),
}
"""A warm-up that knows of fewer products, a step with penalties that waits, a capture that copies from the host."""


def config(**given: Any) -> Resolved:
    values: dict[str, Any] = {"max_len": 4096, "pages": (2048,), "slots": 64, "max_rows": 64, "max_tokens": 2048}
    values |= {"dtype": "bfloat16", "cache_dtype": "bfloat16", "graphs": "whole", "cascade": "auto"}
    return Resolved(backend="torch", platform="gpu", **(values | given))


def request(rid: int, rng: Any, vocab: int, most: int) -> Request:
    """Of 1 to some 3,000 tokens, but fewer than `most`, every other begun alike; some ask for this or that."""
    size = int(rng.choice([1, 2, 15, 16, 17, 40, 300, 1024, 1500, 3000]))
    size = min(size, most - 220)
    tokens = np.concatenate([np.arange(200) % vocab if rid % 2 else [], rng.integers(0, vocab, size)])
    some: dict[str, Any] = {"max_new_tokens": int(rng.integers(1, 12)), "ignore_eos": True, "temperature": 0}
    if rng.random() < 0.4:
        some |= {"temperature": 0.8, "seed": rid}
        some |= rng.choice([{}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.5, "min_p": 0.1}])
    if rng.random() < 0.3:
        some |= rng.choice(
            [{"logprobs": 3}, {"prompt_logprobs": 2}, {"frequency_penalty": 0.5}, {"logit_bias": {7: 3.0}}]
        )
    return Request(rid=str(rid), tokens=tuple(int(t) for t in tokens), params=SamplingParams.of(some), seed=rid)


def serve(case: str, seed: int) -> None:
    spec, given = CASES[case]
    rng, numbers, groups = np.random.default_rng(seed), count(), len(cache_groups(spec, 16))
    backend = open_backend("torch", spec, config(**{"pages": (2048,) * groups} | given))
    backend.load(RandomWeights(spec, seed=0))
    backend.warmup()
    ready, told = len(pretended.KERNELS), list[Any]()
    loop = Loop(Scheduler(backend.limits), backend, told.extend)
    for wave in (1, 1, 1, 2, 3, 5, 17, 40):
        for _ in range(wave):
            loop.scheduler.submit(request(next(numbers), rng, spec.vocab, backend.limits.max_len), 0.0)
        while loop.busy:
            loop.turn()
    for each in told:
        if each.error is not None:
            print(f"{case}: failed: {each.error}")
    for name in pretended.KERNELS[ready:]:
        print(f"{case}: late: {name}")
    status = backend.status()
    if status.compiles_after_ready != len(pretended.KERNELS) - ready:
        print(f"{case}: counted: {status.compiles_after_ready}")
    print(f"{case}: {ready} kernels, {loop.steps} steps, {status.ran}", file=sys.stderr)
    backend.close()


def main(seed: int, cases: list[str]) -> None:
    pretended.begin()
    if fault := os.environ.get("FAULT"):
        FAULTS[fault]()
    for case in cases:
        serve(case, seed)
        pretended.forget()
    print("done")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
