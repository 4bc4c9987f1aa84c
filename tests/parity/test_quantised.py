"""Quantised matrices: an engine that quantises on load, against transformers with what the numbers stand for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from backends.api.ties import first_difference, near_tie
from backends.probe import probe
from engine.config import load
from engine.model import quant
from engine.model.checkpoint import Checkpoint
from engine.model.params import params
from engine.model.quant import Dequantised
from engine.model.registry import FAMILIES, read_spec
from engine.model.rules import origins
from engine.model.spec import fit
from engine.model.weights import WeightSource
from engine.resolve import resolve
from engine.resolve.memory import plan_memory
from radixmesh.parity.compare import Verdict, compare
from radixmesh.parity.readings import Reading, read_backend, read_oracle
from tests.parity import meshed
from tests.parity.test_families import PROMPT, opened, spec_of, worst
from tests.tiny import SHAPES, Tiny, prompt, tiny

MADE = 24
SLOW = (pytest.mark.slow, pytest.mark.timeout(1200))
CASES = (
    ("llama-grouped", "int8"),
    ("qwen3_moe-some-dense", "fp8"),
    ("mixtral-window", "int8"),
    ("llama-grouped", "fp8-row"),
)
Judge = Callable[[str, str], tuple[Tiny, Reading]]


def write_dequantised(model: Tiny, kind: str, to: Path) -> None:
    """The checkpoint of a model whose matrices are what quantised ones stand for, in float32."""
    spec = spec_of(model)
    source = Dequantised(Checkpoint(model.path, spec), spec, kind)
    values = {p.name: source.read(p.name, tuple(slice(0, n) for n in p.shape)) for p in params(spec).values()}
    tensors = {
        name: origin.join(
            [values[p.name] if origin.expert is None else values[p.name][origin.expert] for p in origin.params]
        )
        for name, origin in origins(FAMILIES[spec.family].RULES, len(spec.layers), params(spec)).items()
    }
    to.mkdir()
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_text((model.path / "config.json").read_text())


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """(shape, kind) -> the model as it is, and what transformers makes of the dequantised one."""
    made: dict[tuple[str, str], tuple[Tiny, Reading]] = {}

    def get(shape: str, kind: str) -> tuple[Tiny, Reading]:
        if (shape, kind) not in made:
            folder = tmp_path_factory.mktemp(shape)
            model = tiny(folder / "full", **SHAPES[shape])
            write_dequantised(model, kind, folder / "less")
            made[shape, kind] = model, read_oracle(spec_of(model), folder / "less", prompt(model, PROMPT), MADE)
        return made[shape, kind]

    return get


def verdict_of(judged: tuple[Tiny, Reading], backend: str, **more: Any) -> Verdict:
    model, right = judged
    with opened(model, backend, **more) as device:
        return compare(right, read_backend(backend, device, spec_of(model), prompt(model, PROMPT), MADE))


@pytest.mark.parametrize(("shape", "kind"), CASES)
@pytest.mark.parametrize("backend", ["jax", "torch", "reference"])
def test_is_transformers_with_what_the_numbers_stand_for(judge: Judge, backend: str, shape: str, kind: str) -> None:
    """Layer by layer, then greedy tokens. On jax Mixtral is scanned, the form that TPUs run, and the others listed."""
    stack = {"backend.jax.stack": "scan" if shape == "mixtral-window" else "list"} if backend == "jax" else {}
    verdict = verdict_of(judge(shape, kind), backend, **{"model.quantise": kind}, **stack)
    assert verdict.ok, worst(verdict)


def test_it_shows_where_nothing_is_quantised(judge: Judge) -> None:
    """The judge is not so near to the model as it was that anything would do."""
    assert not verdict_of(judge("llama-grouped", "int8"), "reference").ok
    assert not verdict_of(judge("llama-grouped", "int8"), "reference", **{"model.quantise": "fp8"}).ok


def test_a_wrong_scale_shows(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output by its neighbour's scale."""

    def rolled(source: WeightSource, made: quant.Form) -> Any:
        body, scale = read_quantised(source, made)
        return body, np.roll(scale, 1, axis=-1)

    read_quantised = quant.read_quantised
    monkeypatch.setattr(quant, "read_quantised", rolled)
    verdict = verdict_of(judge("llama-grouped", "int8"), "jax", **{"model.quantise": "int8"})
    assert verdict.first == "layers.0.attention"


def test_memory_counts_it(judge: Judge) -> None:
    model, _ = judge("llama-grouped", "int8")
    spec, sizes = spec_of(model), {}
    cases = (("jax", "none"), ("jax", "int8"), ("torch", "int8"), ("torch", "fp8"), ("reference", "int8"))
    for backend, kind in cases:
        config = load(None, {"model": str(model.path), "backend": backend, "model.quantise": kind})
        resolved, decisions = resolve(config, spec, probe(backend, "cpu"))
        sizes[backend, kind] = plan_memory(spec, resolved).weights
        assert next(d for d in decisions if d.field == "quantise").why.startswith("model.quantise")
        with opened(model, backend, **{"model.quantise": kind}) as opened_backend:
            if backend != "reference":
                assert opened_backend.status().memory["weights"] == sizes[backend, kind]
    assert sizes["reference", "int8"] == sizes["jax", "none"] > 1.5 * sizes["jax", "int8"]
    assert sizes["torch", "int8"] == sizes["jax", "int8"]


@pytest.mark.parametrize(
    ("name", "sizes", "kind", "shape"),
    [
        ("llama", (2,), "int8", {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 100}),
        pytest.param("qwen3-moe", (4, 2), "int8", SHAPES["qwen3_moe-some-dense"], marks=SLOW),
        pytest.param("mixtral", (4, 2), "int8", SHAPES["mixtral-window"], marks=SLOW),
        pytest.param(
            "llama-blocks", (4, 2), "fp8", {"q_heads": 4, "kv_heads": 4, "head_dim": 128, "ffn": 512}, marks=SLOW
        ),
    ],
)
def test_a_mesh_of_quantised_parts_is_one_device(
    tmp_path: Path, name: str, sizes: tuple[int, ...], kind: str, shape: dict[str, Any]
) -> None:
    """Layer by layer and token by token as on one device; the engine's tokens as transformers', of what the numbers
    stand for."""
    model, less = tiny(tmp_path / name, **shape), tmp_path / "less"
    write_dequantised(model, kind, less)
    spec = fit(read_spec(model.path), meshed.SMALL["model.max_len"])
    prompts = [prompt(model, PROMPT), prompt(model, 9, seed=2)]
    asked, target = tmp_path / "prompts.json", tmp_path / "found.npz"
    asked.write_text(json.dumps(prompts))
    command = [sys.executable, "-m", "tests.parity.meshed", "jax", ",".join(map(str, sizes))]
    command += [str(model.path), str(asked), str(target), f"model.quantise={kind}"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=250 * len(sizes), check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    with np.load(target) as found:
        alone = meshed.restore(found, "alone")
        readings = {size: meshed.restore(found, f"{size}/whole") for size in sizes}
        facts = json.loads(str(found["facts"]))
    oracles = [read_oracle(spec, less, p, meshed.MADE) for p in prompts]
    for size in sizes:
        for right in (alone, oracles[0]):
            verdict = compare(right, readings[size])
            assert verdict.ok, f"tp={size} beside {right.name}: first {verdict.first}, tokens {verdict.differs}"
        for tokens in facts[str(size)]["engine"]["tokens"][:2]:
            for made, oracle in zip(tokens, oracles, strict=True):
                at = first_difference(oracle.tokens, made)
                assert at is None or near_tie(oracle.margins[at], 1e-5), f"token {at}, margin {oracle.margins[at]}"
