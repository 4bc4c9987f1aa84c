"""Tensor parallel: a mesh gives what one device gives, and what Hugging Face gives in float32; and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from backends.api.ties import first_difference, near_tie
from engine.config import load
from engine.errors import BackendLost, ConfigError
from engine.model.registry import read_spec
from engine.model.spec import fit
from engine.resolve.memory import plan_memory
from engine.run.start import decide
from radixmesh import Engine
from radixmesh.parity.compare import compare
from radixmesh.parity.readings import Reading, read_oracle
from tests.parity.meshed import MADE, SMALL, restore
from tests.tiny import SHAPES as tiny_shapes
from tests.tiny import Tiny, assert_honest, prompt, tiny

PROMPT, BACKENDS = 40, ("jax", "torch")
SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    # one kv head on both devices, a vocabulary that two do not divide, biases of every kind
    "llama-odd": (
        (2,),
        {"hidden": 60, "q_heads": 4, "kv_heads": 1, "head_dim": 24, "tied": True, "vocab": 193, "bias": True},
    ),
    # each of two kv heads on two devices
    "qwen3": ((4,), {"family": "qwen3", "q_heads": 8, "kv_heads": 2, "head_dim": 16, "layers": 3, "vocab": 250}),
    "llama-even": ((4,), {"q_heads": 4, "kv_heads": 4, "head_dim": 24, "layers": 3, "bias": True}),
    "qwen3-tied": ((2,), {"family": "qwen3", "q_heads": 6, "kv_heads": 2, "head_dim": 20, "tied": True, "bias": True}),
    "llama-three": ((3,), {"hidden": 48, "q_heads": 6, "kv_heads": 3, "ffn": 99, "vocab": 100}),
}
"""Name -> sizes of the meshes, keywords of `tiny`."""
QUICK = ("llama-odd", "qwen3")
FAMILIES = (
    "llama-2",
    "llama-rope-llama3",
    "qwen2-half-windowed",
    "qwen3-grouped",
    "mistral-window",
    "gemma2-caps",
    "gemma3-two-ropes",
    "phi3-long",
    "phi3-short",
    "gpt_oss-sinks",
    "qwen3_moe-some-dense",
    "mixtral-window",
)
"""Names in tests.tiny, every family: 4 query heads, and 1, 2 or 4 kv heads, so that 4 devices repeat some."""
SHAPES |= {name: ((4, 2), tiny_shapes[name]) for name in FAMILIES}
SLOW = (pytest.mark.slow, pytest.mark.timeout(1200))


MESHES = [
    pytest.param(shape, size, marks=() if shape in QUICK else SLOW)
    for shape, (sizes, _) in SHAPES.items()
    for size in sizes
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A model, its prompts, what Hugging Face computes of each, and what meshes found (tests.parity.meshed).

    readings: "2/whole", "2/chunked" of two devices, and so on; "alone". facts: by the mesh's size."""

    model: Tiny
    prompts: list[list[int]]
    oracle: list[Reading]
    readings: dict[str, Reading]
    facts: dict[int, Any]


@pytest.fixture(scope="module")
def find(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Found]:
    """(backend, shape) -> what was found, once."""
    models: dict[str, tuple[Tiny, list[list[int]], list[Reading]]] = {}
    made: dict[tuple[str, str], Found] = {}

    def get(backend: str, shape: str) -> Found:
        sizes, keywords = SHAPES[shape]
        if shape not in models:
            model = tiny(tmp_path_factory.mktemp(shape), **keywords)
            assert_honest(model)
            longest = prompt(model, PROMPT)
            prompts = [longest, longest[:24] + prompt(model, 9, seed=2), prompt(model, 5, seed=3)]
            spec = fit(read_spec(model.path), SMALL["model.max_len"])  # the judge's rope is of the engine's length
            models[shape] = model, prompts, [read_oracle(spec, model.path, p, MADE) for p in prompts]
        if (backend, shape) not in made:
            model, prompts, oracle = models[shape]
            folder = tmp_path_factory.mktemp(f"{shape}-{backend}")
            asked, target = folder / "prompts.json", folder / "found.npz"
            asked.write_text(json.dumps(prompts))
            program = [sys.executable, "-m", "tests.parity.meshed", backend, ",".join(map(str, sizes))]
            limit = 250 if shape in QUICK else 1100
            ran = subprocess.run(
                [*program, model.path, asked, target], capture_output=True, text=True, timeout=limit, check=False
            )
            assert ran.returncode == 0, ran.stderr[-4000:]
            with np.load(target) as found:
                names = [f"{size}/{name}" for size in sizes for name in ("whole", "chunked")]
                readings = {name: restore(found, name) for name in (*names, "alone")}
                facts = {int(size): said for size, said in json.loads(str(found["facts"])).items()}
            made[backend, shape] = Found(model=model, prompts=prompts, oracle=oracle, readings=readings, facts=facts)
        return made[backend, shape]

    return get


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "size"), MESHES)
def test_agrees_layer_by_layer(find: Callable[[str, str], Found], backend: str, shape: str, size: int) -> None:
    """With Hugging Face and with one device: every inner value, whole and chunked; 64 greedy tokens."""
    found = find(backend, shape)
    for judge in (found.oracle[0], found.readings["alone"]):
        for name, count in (("whole", MADE), ("chunked", 2)):
            short = replace(judge, tokens=judge.tokens[:count], margins=judge.margins[:count])
            verdict = compare(short, found.readings[f"{size}/{name}"])
            assert verdict.ok, f"{name} beside {judge.name}: first {verdict.first}, tokens {verdict.differs}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "size"), MESHES)
def test_the_engine_agrees_cold_chunked_and_warm(
    find: Callable[[str, str], Found], backend: str, shape: str, size: int
) -> None:
    """Prompts of 78 tokens together, in steps of 64 at most; then from a warm cache."""
    found = find(backend, shape)
    said = found.facts[size]["engine"]
    for tokens in said["tokens"][:2]:
        for made, oracle in zip(tokens, found.oracle, strict=True):
            at = first_difference(oracle.tokens, made)
            assert at is None or near_tie(oracle.margins[at], 1e-5), f"token {at}, margin {oracle.margins[at]}"
    whole = [(len(p) - 1) // 8 * 8 for p in found.prompts]  # whole pages, one token must be fed
    windows = {layer.mixer.window for layer in read_spec(found.model.path).layers} - {None}
    cached = said["cached"][1]
    if windows:  # of a window too little may be left
        assert all(c % 8 == 0 and c <= most for c, most in zip(cached, whole, strict=True))
    else:
        assert cached == whole
    assert said["late"] == 0
    if backend == "torch":
        assert said["device"] == f"{size} x cpu"


@pytest.mark.parametrize(("shape", "size"), MESHES)
def test_jax_and_torch_draw_the_same(find: Callable[[str, str], Found], shape: str, size: int) -> None:
    """Sampled with a seed: one in three may differ at a near-tie, which is not measured here."""
    jax, torch = (find(backend, shape).facts[size]["engine"]["tokens"][2] for backend in ("jax", "torch"))
    assert sum(a == b for a, b in zip(jax, torch, strict=True)) >= 2


@pytest.mark.parametrize(("shape", "size"), MESHES)
def test_a_step_has_two_sums_a_layer(find: Callable[[str, str], Found], shape: str, size: int) -> None:
    """And one for the embedding; logits are dealt out once, and what is chosen is joined by a sum; no more."""
    found = find("jax", shape)
    layers = len(read_spec(found.model.path).layers)
    want = {"all-reduce": 2 * layers + 2, "all-to-all": 1}
    assert found.facts[size]["collectives"] == [want] * 2  # both buckets


def test_on_a_cut_cpu_one_step_runs_at_a_time(find: Callable[[str, str], Found]) -> None:
    """jax's devices are threads there, and a queue of steps can take all of them (docs/decisions/0012)."""
    assert find("jax", "qwen3").facts[4]["finished"]


def test_memory_is_of_one_device(find: Callable[[str, str], Found]) -> None:
    """What explain says is what is held, padding and repeated heads included."""
    for backend in ("jax", "torch"):
        found = find(backend, "llama-odd")
        given = SMALL | {"model": str(found.model.path), "backend": backend, "mesh": "tp=2"}
        decided = decide(load(None, given), found.model.path)
        plan, held = plan_memory(decided.spec, decided.resolved), found.facts[2]["engine"]["memory"]
        assert held["weights"] == plan.weights
        spare = 0 if backend == "jax" else plan.cache[0] // decided.resolved.pages[0]  # torch's line of zeros
        assert 0 <= held["cache"] - sum(plan.cache) <= spare


def test_a_killed_process_is_told_to_every_stream(find: Callable[[str, str], Found]) -> None:
    found = find("torch", "llama-odd")
    given = SMALL | {"backend": "torch", "mesh": "tp=2", "skip_tokenizer": True}
    with Engine(str(found.model.path), **given) as engine:
        params = {"max_new_tokens": 100, "ignore_eos": True}
        streams = [engine.stream(token_ids=p, sampling_params=params) for p in found.prompts[:2]]
        for stream in streams:
            next(stream)
        os.kill(engine._client.carrier.loop.backend.pids[1], signal.SIGKILL)  # type: ignore[attr-defined]
        for stream in streams:
            with pytest.raises(BackendLost, match="the process of rank 1 was killed by SIGKILL"):
                list(stream)
        with pytest.raises(BackendLost, match="rank 1"):
            engine.generate(token_ids=found.prompts[0], sampling_params=params)


@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        ("tp=3", "tp=3 does not divide q_heads=4"),
        ("tp=8", "tp=8 does not divide q_heads=4"),
        ("tp=2,dp=2", "dp=2 is not built yet"),
        ("ep=2", "ep=2 is not built yet"),
        ("pp=2", "pp=2 is not built yet"),
    ],
)
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_mesh_that_can_not_be_is_refused_before_anything_starts(
    find: Callable[[str, str], Found], backend: str, mesh: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.run.start.open_device", lambda decided: pytest.fail("something was started"))
    with pytest.raises(ConfigError, match=says) as refused:
        Engine(str(find("jax", "llama-odd").model.path), backend=backend, mesh=mesh, skip_tokenizer=True)
    assert refused.value.field == "mesh"
