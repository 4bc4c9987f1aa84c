"""The numpy oracle against Hugging Face, and what it alone refuses."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import rms_norm
from transformers import Qwen3Config, Qwen3ForCausalLM

from backends.api.build import Host
from backends.api.conformance.bench import SPEC, Ask, Weights, config, one, prompt, refused
from backends.api.ties import judge, margin
from backends.reference import model as decoder
from backends.reference.backend import ReferenceBackend
from engine.config import Resolved
from engine.errors import ConfigError, DeviceFailed, ModelError
from engine.mesh import MeshSpec
from engine.model.checkpoint import Checkpoint
from engine.model.registry import read_spec
from engine.model.spec import ModelSpec
from engine.model.weights import WeightSource
from tests.tiny import SHAPES, Tiny, tiny
from tests.tiny import prompt as random_prompt

TOLERANCE = 2e-4
LENGTH, MAKE = 37, 64


def resolved(spec: ModelSpec, **overrides: Any) -> Resolved:
    """Pages of 8, texts of up to 128."""
    values: dict[str, Any] = {"max_len": 128, "page": 8, "pages": (40,) * len({x.mixer.window for x in spec.layers})}
    return config("reference", max_tokens=64, **(values | overrides))


def host_of(spec: ModelSpec, weights: WeightSource, **overrides: Any) -> Host:
    """A loaded backend whose steps return logits."""
    backend = ReferenceBackend(spec, resolved(spec, **overrides))
    backend.load(weights)
    return Host(backend, taps=("logits",))


def run(host: Host, ids: list[int], make: int, chunk: int) -> tuple[list[int], NDArray[np.float32]]:
    """Greedy tokens, and the logits float32[T, V] of every token fed: the prompt in chunks, then what was made."""
    text, tokens, seen = host.open(), [], []
    parts = [ids[at : at + chunk] for at in range(0, len(ids), chunk)] + [[-1]] * (make - 1)
    for i, part in enumerate(parts):
        ends = i >= len(parts) - make
        result = host.run([(text, host.row(text, part, output=int(ends)))])
        seen.append(result.taps["logits"])
        tokens += result.tokens[0, : int(ends)].tolist()
    host.close(text)
    return tokens, np.concatenate(seen)


@pytest.fixture(scope="module", params=["llama-odd-heads", "llama-rope-llama3", "qwen3-biases"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp(request.param), **SHAPES[request.param])


def measure(model: Tiny, host: Host, chunk: int) -> tuple[float, float]:
    """Greedy tokens are those of Hugging Face up to near-ties; (largest logit difference, standard deviation)."""
    ids = random_prompt(model, LENGTH)
    made, found = run(host, ids, MAKE, chunk)
    truth = model.logits([*ids, *made[:-1]]).numpy()
    difference, spread = float(np.abs(found - truth).max()), float(truth.std())
    tail = truth[LENGTH - 1 :]
    ties = judge([tail.argmax(1).tolist()], [made], [[margin(row) for row in tail]], difference)
    assert ties.ok, (ties, difference)
    assert len(set(made)) > MAKE // 3, "a model that repeats itself tests little"
    return difference, spread


@pytest.mark.parametrize("chunk", [64, 5, 1])
def test_greedy_decoding_is_that_of_transformers(small: Tiny, chunk: int) -> None:
    spec = read_spec(small.path)
    difference, spread = measure(small, host_of(spec, Checkpoint(small.path, spec)), chunk)
    assert difference <= TOLERANCE * max(1.0, spread)


def test_float64_is_that_of_transformers_in_float64(small: Tiny) -> None:
    """transformers' norms and its eager softmax round to float32 whatever the model, so they are replaced."""
    spec, ids = read_spec(small.path), random_prompt(small, LENGTH)
    hf = copy.deepcopy(small.hf).double()
    hf.set_attn_implementation("sdpa")
    for m in hf.modules():
        if type(m).__name__.endswith("RMSNorm"):
            m.forward = partial(rms_norm, normalized_shape=m.weight.shape, weight=m.weight, eps=m.variance_epsilon)
    truth = replace(small, hf=hf).logits(ids).numpy()
    _, double = run(host_of(spec, Checkpoint(small.path, spec), dtype="float64", cache_dtype="float64"), ids, 1, 10)
    _, single = run(host_of(spec, Checkpoint(small.path, spec)), ids, 1, 10)
    far, near = np.abs(single - truth).max(), np.abs(double - truth).max()
    assert near <= 3e-6, "what is left: each rounds the cosines of rope to float32 in its own way"
    assert far > 2 * near


def test_windows_are_those_of_transformers(tmp_path: Path) -> None:
    """A Qwen3 whose second layer slides, from transformers, with the same weights."""
    model = tiny(tmp_path, **SHAPES["qwen3-grouped"])
    slides = {"use_sliding_window": True, "sliding_window": 11, "layer_types": ["full_attention", "sliding_attention"]}
    hf = Qwen3ForCausalLM._from_config(
        Qwen3Config(**(model.hf.config.to_dict() | slides)), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    hf.load_state_dict(model.hf.state_dict())
    full = read_spec(tmp_path)
    layers = (full.layers[0], replace(full.layers[1], mixer=replace(full.layers[1].mixer, window=11)))
    weights = Checkpoint(tmp_path, full)
    for chunk in (64, 7):
        difference, spread = measure(replace(model, hf=hf), host_of(replace(full, layers=layers), weights), chunk)
        assert difference <= TOLERANCE * max(1.0, spread)
    ids = random_prompt(model, LENGTH)
    apart = model.logits(ids).numpy() - replace(model, hf=hf).logits(ids).numpy()
    assert np.abs(apart).max() > 0.1, "the window matters"


def _key_rope_off_by_one(patch: pytest.MonkeyPatch, spec: ModelSpec) -> ModelSpec:
    kv_heads, rotate = spec.layers[0].mixer.kv_heads, decoder.rotate

    def slip(rope: Any, x: NDArray[Any], positions: NDArray[Any]) -> NDArray[Any]:
        return rotate(rope, x, positions + (x.shape[1] == kv_heads))

    patch.setattr(decoder, "rotate", slip)
    return spec


def _norm_epsilon(patch: pytest.MonkeyPatch, spec: ModelSpec) -> ModelSpec:
    return replace(spec, norm_eps=1e-5)


def _head_group(patch: pytest.MonkeyPatch, spec: ModelSpec) -> ModelSpec:
    attend = decoder.attend

    def slip(a: Any, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], *rest: Any) -> NDArray[Any]:
        return attend(a, q, np.roll(k, 1, axis=1), np.roll(v, 1, axis=1), *rest)

    patch.setattr("backends.reference.caches.attend", slip)
    return spec


@pytest.mark.parametrize("slip", [_key_rope_off_by_one, _norm_epsilon, _head_group])
def test_a_slip_shows_ten_times(slip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(tmp_path, **SHAPES["llama-odd-heads"])
    spec = read_spec(tmp_path)
    host = host_of(slip(monkeypatch, spec), Checkpoint(tmp_path, spec))
    truth = model.logits(random_prompt(model, LENGTH)).numpy()
    found = run(host, random_prompt(model, LENGTH), 1, 64)[1]
    assert np.abs(found - truth).max() > 10 * TOLERANCE * max(1.0, float(truth.std()))


def fresh(**overrides: Any) -> Host:
    """The suite's model."""
    return host_of(SPEC, Weights(), **({"pages": (40, 40)} | overrides))


def test_the_cache_is_rounded_to_its_dtype() -> None:
    ids = prompt(20)
    exact, rounded = (run(fresh(cache_dtype=d), ids, 1, 6)[1] for d in ("float32", "bfloat16"))
    assert np.abs(exact[:6] - rounded[:6]).max() > 1e-3
    assert np.abs(exact - rounded).max() < 1.0


def test_it_refuses_what_was_not_sent_since_a_slot_was_seated() -> None:
    host = fresh()
    text = host.open()
    text.start = -1
    never = host.step([(text, host.row(text, [-1]))])
    refused(lambda: host.backend.forward(never), "starts", (0,))
    old = host.open()
    host.run([(old, host.row(old, prompt(9)))])
    host.close(old)
    new = host.open()
    row = host.row(new, prompt(9))
    new.unsent[0].remove(1)  # the stale entry would do, by luck
    step = host.step([(new, row)])
    refused(lambda: host.backend.forward(step), "tables")


def test_it_refuses_a_last_token_that_does_not_exist() -> None:
    host = fresh()
    text = host.open()
    host.run([(text, host.row(text, prompt(4), output=0))])
    step = host.step([(text, host.row(text, [-1]))])
    refused(lambda: host.backend.forward(step), "tokens", (0,))


def test_it_refuses_an_upper_bound_that_is_none() -> None:
    host = fresh()
    text = host.open()
    host.run([(text, host.row(text, prompt(4)))])
    text.upper = 1
    step = host.step([(text, host.row(text, [-1]))])
    refused(lambda: host.backend.forward(step), "upper", (0,))


def test_a_failed_device_voids_tickets_and_caches() -> None:
    """The step that kills is told by its content; afterwards texts are fed again and give what they would have."""
    host, ask = fresh(), Ask(prompt=prompt(6), make=5)
    backend = host.backend
    assert isinstance(backend, ReferenceBackend)
    want = one(host, ask).tokens
    backend.fails = lambda step: 99 in step.tokens
    text, bad = host.open(), host.open()
    first = int(host.run([(text, host.row(text, ask.prompt))]).tokens[0, 0])
    doomed = host.enqueue([(text, host.row(text, [-1])), (bad, host.row(bad, [1, 99]))])
    later = host.enqueue([(text, host.row(text, [-1]))])
    with pytest.raises(DeviceFailed):
        backend.collect(doomed)
    refused(lambda: backend.collect(later))
    step = host.step([(text, host.row(text, [-1]))])
    refused(lambda: backend.forward(step), "starts", (0,))
    for each in (text, bad):
        host.close(each)
    assert [first, *one(host, Ask(prompt=[*ask.prompt, first], make=4)).tokens] == want


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"mesh": MeshSpec(tp=2)}, "mesh"),
        ({"options": {"max_drafts": 2}}, "max_drafts"),
    ],
)
def test_settings_that_it_cannot_honour(overrides: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as found:
        ReferenceBackend(SPEC, resolved(SPEC, **overrides))
    assert found.value.field == field


def test_a_weight_of_the_wrong_shape() -> None:
    class Wrong(Weights):
        def read(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
            value = super().read(name, part)
            return value[:-1] if name == "layers.1.mlp.up" else value

    with pytest.raises(ModelError) as found:
        host_of(SPEC, Wrong(), pages=(40, 40))
    assert found.value.field == "layers.1.mlp.up"
