"""What the jax backend does on a GPU, tried on a CPU: attention interpreted, greedy steps, weights made there."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from backends.api.build import Host
from backends.api.conformance.bench import SPEC, Ask, Weights, config, generate, prompt
from backends.jax import attend, attend_gpu, params
from backends.jax.backend import JaxBackend
from backends.jax.mesh import open_mesh
from backends.jax.step import Plan
from backends.jax.warmup import LARGE, LIBRARY, Program, options
from backends.reference.backend import ReferenceBackend
from engine.model.params import params as named
from engine.model.spec import ModelSpec
from engine.model.weights import RandomWeights


def test_its_attention_gives_the_tokens_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a window; rows of one token and of many in one step, chunks, a small bucket and a large one."""
    kernel = partial(attend_gpu.paged, interpret=True)
    monkeypatch.setattr(attend, "choose", lambda a, config, tree=0: (kernel, "interpreted"))
    spec: ModelSpec = replace(SPEC, layers=SPEC.layers[1:])
    backend = JaxBackend(spec, config("jax", max_tokens=33, token_buckets=(1, 33), pages=(64,)))
    reference = ReferenceBackend(spec, config("reference", max_tokens=33, pages=(64,)))
    asks = [Ask(prompt=prompt(n, seed=n), make=3, chunk=17) for n in (30, 1)]
    made = []
    for one in (backend, reference):
        one.load(Weights(spec=spec))
        host = Host(one)
        made.append([m.tokens for m in (*generate(host, asks[:1]), *generate(host, asks))])
        one.close()
    assert made[0] == made[1]


def test_greedy_steps_draw_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that draw are chosen by another program, beside rows that don't."""
    values = {"temperature": 0.8, "seed": 5, "top_k": 7, "top_p": 0.9, "min_p": 0.02}
    asks = [Ask(prompt=prompt(n), make=4, values=values if n % 2 else {}) for n in (1, 2, 9)]
    made = []
    for greedy in (True, False):
        monkeypatch.setattr(Plan, "greedy", greedy)
        backend = JaxBackend(SPEC, config("jax"))
        backend.load(Weights())
        made.append([m.tokens for m in generate(Host(backend), asks)])
        assert any(program.kind == "choose" for program in backend.programs.made) == greedy
        backend.close()
    assert made[0] == made[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_random_weights_made_on_the_device_are_those_of_the_host(dtype: str) -> None:
    spec: ModelSpec = replace(SPEC, dtype=dtype)
    source, mesh = RandomWeights(spec, seed=3), open_mesh(config("jax"))
    for name, p in named(spec).items():
        made = params.draw(source, p, params.DTYPES[dtype], mesh)
        read = source.read(name, tuple(slice(0, n) for n in p.shape))
        assert made.shape == p.shape
        assert np.asarray(made).tobytes() == read.tobytes(), name


def test_what_is_chosen_and_how_it_is_compiled() -> None:
    gpu = replace(config("jax"), platform="gpu")
    full, odd = SPEC.layers[0].mixer, replace(SPEC.layers[0].mixer, head_dim=24)
    assert attend.choose(full, gpu)[0] is attend_gpu.paged
    kernel, why = attend.choose(odd, gpu)
    assert kernel is attend.plain
    assert "head 24" in why
    plan: Any = Plan(spec=SPEC, config=gpu, limits=None, mesh=None)  # type: ignore[arg-type]
    assert options(plan, Program("step", LARGE)) == LIBRARY
    assert options(plan, Program("step", LARGE - 1)) == {}
