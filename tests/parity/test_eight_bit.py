"""Caches of 8 bits on whole models: near to Hugging Face, the same through the scheduler; where scales come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from backends import open_backend
from backends.api.ties import first_difference, near_tie
from engine.config import load
from engine.errors import ConfigError, ModelError
from engine.model.checkpoint import Checkpoint
from engine.model.registry import read_spec
from engine.run.start import decide
from engine.sched.admission import LOW
from radixmesh import Engine
from radixmesh.cli import make_app
from radixmesh.parity.readings import Reading, read_backend
from tests.parity.test_preempted import LONG, MADE, TIGHT, Watch
from tests.tiny import SHAPES, Tiny, prompt, tiny

STEP = 0.02
"""What logits may differ by where numbers became the neighbour of what they became elsewhere."""


def run(*args: str) -> Result:
    return CliRunner().invoke(make_app(), args)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A model, and what calibrate wrote of it."""

    model: Tiny
    file: Path

    def keys(self, kind: str) -> dict[str, Any]:
        return {"cache.dtype": kind} | ({"cache.scales": str(self.file)} if kind == "int8" else {})

    def parity(self, kind: str, *more: str, file: Path | None = None) -> Any:
        scales = ["--set", f"cache.scales={file or self.file}"] if kind == "int8" else []
        done = run(
            "parity", "--model", str(self.model.path), "--tokens", "96", "--max-new-tokens", "8", "--cache-dtype", kind,
            *scales, *more, "--json",
        )  # fmt: skip
        assert done.exit_code in (0, 1), done.output
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Measured]:
    made: dict[str, Measured] = {}

    def get(shape: str) -> Measured:
        if shape not in made:
            folder = tmp_path_factory.mktemp(shape)
            model, file = tiny(folder / "m", **SHAPES[shape]), folder / "scales.json"
            done = run("calibrate", "--model", str(model.path), "--tokens", "256", "--out", str(file))
            assert done.exit_code == 0, done.output
            made[shape] = Measured(model=model, file=file)
        return made[shape]

    return get


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_near_to_hugging_face(measured: Callable[[str], Measured], kind: str) -> None:
    """Within the thresholds, and no nearer than 8 bits can be; in bfloat16 too."""
    report = measured("llama-grouped").parity(kind, "--a", "hf", "--b", "torch", "--b", "reference")
    for s in report["subjects"]:
        assert s["ok"], [c for c in s["checks"] if not c["ok"]]
        assert s["summary"]["kl_mean"] > 1e-4
    half = measured("llama-grouped").parity(kind, "--a", "hf", "--b", "torch:bfloat16")
    assert half["ok"], [c for c in half["subjects"][0]["checks"] if not c["ok"]]


def test_two_backends_are_nearer_to_each_other(measured: Callable[[str], Measured]) -> None:
    assert measured("qwen3-grouped").parity("int8", "--a", "reference", "--b", "torch")["ok"]


def test_swapped_scales_are_past_the_thresholds(measured: Callable[[str], Measured], tmp_path: Path) -> None:
    """A file that has keys for values."""
    found = json.loads(measured("llama-grouped").file.read_text())
    largest = [{"keys": layer["values"], "values": layer["keys"]} for layer in found["largest"]]
    file = tmp_path / "swapped.json"
    file.write_text(json.dumps({"largest": largest}))
    assert not measured("llama-grouped").parity("int8", "--a", "hf", "--b", "torch", file=file)["ok"]


def test_the_largest_are_those_of_hugging_face(measured: Callable[[str], Measured]) -> None:
    """Of the keys and values that transformers caches of the same tokens; the same on torch."""
    import torch

    found = measured("gemma3-two-ropes")
    spec = read_spec(found.model.path)
    ids = np.random.default_rng(0).integers(0, spec.vocab, 256).tolist()
    with torch.no_grad():
        cached = found.model.hf(torch.tensor([ids]), use_cache=True, past_key_values=_keeping()).past_key_values
    told = json.loads(found.file.read_text())["largest"]
    for layer, entry in zip(cached.layers, told, strict=True):
        for side, values in (("keys", layer.keys), ("values", layer.values)):
            np.testing.assert_allclose(entry[side], values[0].abs().amax((1, 2)).numpy(), rtol=1e-5)
    other = found.file.with_name("torch.json")
    run("calibrate", "--model", str(found.model.path), "--tokens", "256", "--out", str(other), "--backend", "torch")
    for a, b in zip(json.loads(other.read_text())["largest"], told, strict=True):
        for side in ("keys", "values"):
            np.testing.assert_allclose(a[side], b[side], rtol=1e-5)


def _keeping() -> Any:
    """A cache that keeps what is behind a window."""
    from transformers import DynamicCache

    return DynamicCache()


@pytest.mark.parametrize(
    ("backend", "kind", "shape"),
    [
        ("torch", "int8", "gemma3-two-ropes"),
        ("torch", "fp8", "llama-grouped"),
        pytest.param("jax", "int8", "gemma3-two-ropes", marks=pytest.mark.slow),
        ("jax", "fp8", "llama-grouped"),
    ],
)
def test_cold_warm_and_preempted_are_the_reference(
    measured: Callable[[str], Measured], backend: str, kind: str, shape: str
) -> None:
    """Through the scheduler in chunks of 16: in a cache too small for all, then warm; tokens by the near-tie rule."""
    found = measured(shape)
    first = prompt(found.model, 30, seed=1)
    prompts = [first, first[:19] + prompt(found.model, 11, seed=2), prompt(found.model, 30, seed=3)]
    right = [_reference(found, kind, tokens) for tokens in prompts]
    params = {"temperature": 0, "max_new_tokens": MADE, "ignore_eos": True}
    given = TIGHT | found.keys(kind) | {"cache.tokens": 112}
    with Engine(str(found.model.path), backend=backend, skip_tokenizer=True, **given) as engine:
        watch = Watch(engine)
        watch.loop.scheduler.estimate.share = LOW
        together = engine.generate(token_ids=prompts, sampling_params=params)
        assert watch.preemptions > 0
        warm = [engine.generate(token_ids=tokens, sampling_params=params) for tokens in (prompts[0], prompts[0])]
    assert warm[1]["meta_info"]["cached_tokens"] > 0
    for made, judge in (*zip(together, right, strict=True), (warm[0], right[0]), (warm[1], right[0])):
        at = first_difference(judge.tokens, made["output_ids"])
        assert at is None or near_tie(judge.margins[at], STEP), f"token {at}, margin {judge.margins[at]}"


def _reference(found: Measured, kind: str, tokens: list[int]) -> Reading:
    keys = {"model": str(found.model.path), "backend": "reference", "model.max_len": LONG} | found.keys(kind)
    decided = decide(load(None, keys), found.model.path)
    backend = open_backend("reference", decided.spec, decided.resolved)
    backend.load(Checkpoint(decided.path, decided.spec))
    return read_backend("reference", backend, decided.spec, tokens, MADE)


@pytest.mark.parametrize("names", ["{side}_scale", "{side}_proj.output_scale"])
def test_scales_of_a_checkpoint(tmp_path: Path, names: str) -> None:
    """Both names; a cache that is wider has no use for them and reads the rest as ever. Hugging Face with keys and
    values rounded so, by torch's own cast, is the judge."""
    import torch

    model = tiny(tmp_path, **SHAPES["llama-grouped"])
    spec, told = read_spec(model.path), {"k": 0.05, "v": 0.011}
    write_scales(tmp_path, names, told)
    source = Checkpoint(tmp_path, spec)
    got = source.read("layers.1.attention.scales", (slice(0, 2), slice(0, 2)))
    np.testing.assert_array_equal(got, np.array([[0.05] * 2, [0.011] * 2], np.float32))
    tokens, attention = prompt(model, 40), model.hf.model.layers[0].self_attn.__class__
    decided = decide(load(None, {"model": str(tmp_path), "backend": "torch", "cache.dtype": "fp8"}), tmp_path)
    backend = open_backend("torch", decided.spec, decided.resolved)
    backend.load(decided.source())
    found = read_backend("torch", backend, decided.spec, tokens, 1).values["logits"]
    module = __import__(attention.__module__, fromlist=["eager_attention_forward"])
    plain = module.eager_attention_forward

    def rounded(layer: Any, q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> Any:
        def held(x: Any, scale: float) -> Any:
            return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

        return plain(layer, q, held(k, told["k"]), held(v, told["v"]), *rest, **more)

    module.eager_attention_forward = rounded
    try:
        want = model.logits(tokens).numpy()
    finally:
        module.eager_attention_forward = plain
    assert np.abs(want - model.logits(tokens).numpy()).max() > 0.1
    assert np.abs(found - want).max() < STEP


def write_scales(folder: Path, names: str, told: dict[str, Any]) -> None:
    """Scales beside the tensors of a checkpoint, the same for each layer."""
    tensors = load_file(folder / "model.safetensors")
    for i in range(2):
        for side, value in told.items():
            tensors[f"model.layers.{i}.self_attn.{names.format(side=side)}"] = np.array([value], np.float32).reshape(
                np.shape(value) or (1,)
            )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"k": 0.05}, "v_scale' is missing beside"),
        ({"k": 0.05, "v": [1.0, 2.0]}, "v_scale', a scale of the cache, is F32 .2., must be one float"),
        ({"k": 0.05, "v": 0.0}, "v_scale': a scale must be a number above 0, not 0"),
        ({"k": -1.0, "v": 0.1}, "k_scale': a scale must be a number above 0, not -1"),
        ({"k": float("nan"), "v": 0.1}, "k_scale': a scale must be a number above 0, not nan"),
    ],
)
def test_a_scale_of_a_checkpoint_that_is_none_is_named(tmp_path: Path, told: dict[str, Any], says: str) -> None:
    model = tiny(tmp_path, **SHAPES["llama-grouped"])
    write_scales(tmp_path, "{side}_scale", told)
    decided = decide(load(None, {"model": str(model.path), "backend": "torch", "cache.dtype": "fp8"}), tmp_path)
    backend = open_backend("torch", decided.spec, decided.resolved)
    with pytest.raises(ModelError, match=says):
        backend.load(decided.source())


GOOD = {"keys": [1.0, 2.0], "values": [0.5, 0.25]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ([GOOD], "must hold"),
        ({"largest": [GOOD]}, "largest has 1 layers, the model 2"),
        ({"largest": [GOOD, {"keys": [1.0, 2.0]}]}, "largest[1] must hold keys and values"),
        ({"largest": [GOOD, GOOD | {"values": [1.0]}]}, "largest[1].values has 1; the layer has 2 kv heads"),
        ({"largest": [GOOD, GOOD | {"keys": 3}]}, "largest[1].keys is 3; the layer has 2 kv heads"),
        ({"largest": [GOOD | {"keys": [1.0, 0]}, GOOD]}, "largest[0].keys[1] is 0, must be a number above 0"),
        ({"largest": [GOOD | {"keys": [-2.0, 1]}, GOOD]}, "largest[0].keys[0] is -2.0, must be a number above 0"),
        ({"largest": [GOOD | {"values": [1, float("nan")]}, GOOD]}, "largest[0].values[1] is nan"),
        ({"largest": [GOOD | {"values": [1, True]}, GOOD]}, "largest[0].values[1] is True"),
        (None, "can't be read"),
    ],
)
def test_a_file_that_is_wrong_is_named(
    measured: Callable[[str], Measured], tmp_path: Path, content: Any, says: str
) -> None:
    """Before a device is opened."""
    file = tmp_path / "s.json"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    found = replace(measured("llama-grouped"), file=file)
    with pytest.raises(ConfigError) as caught:
        decide(load(None, {"model": str(found.model.path)} | found.keys("int8")), found.model.path)
    assert caught.value.field == "cache.scales"
    assert says in str(caught.value)
    assert str(file) in str(caught.value)


def test_calibrate_refuses() -> None:
    for args, field in ((("--backend", "jax"), "backend"), (("--prompt", "a", "--tokens", "3"), "tokens")):
        done = run("calibrate", "--out", "nowhere", *args)
        assert isinstance(done.exception, ConfigError)
        assert done.exception.field == field
