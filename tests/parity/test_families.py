"""Small honest models of each family: every backend against Hugging Face in float32, and planted slips that show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from backends import open_backend
from backends.api.build import Host
from backends.api.protocol import Backend
from backends.api.ties import first_difference, margin, near_tie
from engine.config import load
from engine.model.checkpoint import Checkpoint
from engine.model.registry import read_spec
from engine.model.spec import Attention, Experts, ModelSpec, Rope, fit
from engine.model.weights import WeightSource
from engine.run.start import decide
from radixmesh import Engine
from radixmesh.parity.compare import Verdict, compare
from radixmesh.parity.readings import Reading, read_backend, read_oracle
from tests.tiny import SHAPES, Tiny, assert_honest, prompt, tiny

BACKENDS = ("jax", "torch", "reference")
BRIEF = (
    "llama-grouped",
    "llama-rope-llama3",
    "qwen3-odd-heads",
    "qwen2-yarn",
    "mistral-window",
    "gemma2-caps",
    "gemma3-two-ropes",
    "phi3-long",
    "gpt_oss-sinks",
    "qwen3_moe-some-dense",
    "mixtral-window",
)
"""Shapes that jax, which takes seconds to compile each, runs in every test; the others only where all tests run."""
EXPERTS = tuple(name for name in SHAPES if name.startswith(("gpt_oss", "qwen3_moe", "mixtral")))
ENGINE = ("llama-grouped", "mistral-window", "gemma3-two-ropes", "phi3-long", "gpt_oss-sinks")
"""Of them, those that jax runs through the engine in every test: every kind of cache, rope and feed-forward."""


def pairs(brief: Sequence[str]) -> list[Any]:
    """(backend, shape), all of them; those of jax that are not brief are slow."""
    slow = lambda backend, shape: [pytest.mark.slow] if backend == "jax" and shape not in brief else []  # noqa: E731
    return [pytest.param(b, shape, marks=slow(b, shape)) for b in BACKENDS for shape in SHAPES]


SMALL: dict[str, Any] = {"dtype": "float32", "sched.slots": 4, "cache.page": 8, "model.max_len": 160}
PROMPT, MADE = 40, 64


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Tiny, Reading]]:
    """Models by shape, with what Hugging Face computes of a prompt."""
    made: dict[str, tuple[Tiny, Reading]] = {}

    def get(shape: str) -> tuple[Tiny, Reading]:
        if shape not in made:
            model = tiny(tmp_path_factory.mktemp(shape), **SHAPES[shape])
            assert_honest(model)
            spec = spec_of(model)
            made[shape] = model, read_oracle(spec, model.path, prompt(model, PROMPT), MADE)
        return made[shape]

    return get


@contextmanager
def opened(
    model: Tiny, name: str, spec: ModelSpec | None = None, weights: WeightSource | None = None, **more: Any
) -> Iterator[Backend]:
    """A backend with a model's weights, and steps of 16 or 64 tokens."""
    steps = {"sched.max_tokens": 64, "sched.token_buckets": [16, 64], "model": str(model.path), "backend": name}
    decided = decide(load(None, SMALL | steps | more), model.path)
    with closing(open_backend(name, spec or decided.spec, decided.resolved)) as backend:
        backend.load(weights or Checkpoint(model.path, decided.spec))
        yield backend


def spec_of(model: Tiny) -> ModelSpec:
    return fit(read_spec(model.path), SMALL["model.max_len"])


def worst(verdict: Verdict) -> str:
    return f"{verdict.name}: first {verdict.first}, tokens differ at {verdict.differs}, {verdict.gaps[-1]}"


@pytest.mark.parametrize(("backend", "shape"), pairs(BRIEF))
def test_agrees_layer_by_layer(models: Callable[[str], tuple[Tiny, Reading]], backend: str, shape: str) -> None:
    """Whole prefill, every inner value; chunked, the same; 64 greedy tokens by the near-tie rule."""
    model, judge = models(shape)
    tokens = prompt(model, PROMPT)
    with opened(model, backend) as device:
        for chunk, count in ((64, MADE), (16, 2)):
            short = replace(judge, tokens=judge.tokens[:count], margins=judge.margins[:count])
            verdict = compare(short, read_backend(backend, device, spec_of(model), tokens, count, chunk))
            assert verdict.ok, f"chunks of {chunk}: {worst(verdict)}"


@pytest.mark.parametrize(("backend", "shape"), pairs(ENGINE))
def test_engine_agrees_cold_chunked_and_warm(
    models: Callable[[str], tuple[Tiny, Reading]], backend: str, shape: str
) -> None:
    """Through the scheduler: prompts together in chunks of 16, then from a warm cache; all like Hugging Face."""
    model, _ = models(shape)
    longest = prompt(model, PROMPT, seed=1)
    prompts = [longest, longest[:24] + prompt(model, 9, seed=2), prompt(model, 5, seed=3)]
    oracle = [read_oracle_tokens(model, p) for p in prompts]
    steps = {"sched.max_tokens": 16, "sched.token_buckets": [16]}
    with Engine(str(model.path), backend=backend, skip_tokenizer=True, **(SMALL | steps)) as engine:
        for warm in (False, True):
            results = engine.generate(
                token_ids=prompts, sampling_params={"temperature": 0, "max_new_tokens": MADE, "ignore_eos": True}
            )
            for result, (expected, margins) in zip(results, oracle, strict=True):
                at = first_difference(expected, result["output_ids"])
                assert at is None or near_tie(margins[at], 1e-5), f"warm={warm}: token {at}, margin {margins[at]}"
                meta = result["meta_info"]
                if warm:  # all that can be: whole pages, and one token must be fed
                    assert meta["cached_tokens"] == (meta["prompt_tokens"] - 1) // 8 * 8


def read_oracle_tokens(model: Tiny, tokens: Sequence[int]) -> tuple[list[int], list[float]]:
    spec = spec_of(model)
    reading = read_oracle(spec, model.path, tokens, MADE)
    return reading.tokens, reading.margins


@pytest.mark.parametrize("shape", ["gemma3-linear", "mixtral-window"])
def test_listed_layers_agree(models: Callable[[str], tuple[Tiny, Reading]], shape: str) -> None:
    """The form of GPUs and of larger models on a CPU, whose matrices are turned there; TPUs scan, as small models do on
    a CPU, in every other test."""
    model, judge = models(shape)
    with opened(model, "jax", **{"backend.jax.stack": "list"}) as device:
        reading = read_backend("jax", device, spec_of(model), prompt(model, PROMPT), 1)
    verdict = compare(replace(judge, tokens=judge.tokens[:1], margins=judge.margins[:1]), reading)
    assert verdict.ok, worst(verdict)


@pytest.mark.parametrize("shape", ["gemma2-caps", "gpt_oss-sinks", "mixtral-window"])
def test_a_16_bit_checkpoint_is_computed_in_float32(shape: str, tmp_path: Path) -> None:
    """torch packs its matrices, each expert's on its own; the values are the same."""
    model = tiny(tmp_path, **SHAPES[shape])
    model.hf.bfloat16().save_pretrained(tmp_path)
    judge = read_oracle(spec_of(model), tmp_path, prompt(model, PROMPT), 16)
    with opened(model, "torch") as device:
        verdict = compare(judge, read_backend("torch", device, spec_of(model), prompt(model, PROMPT), 16))
    assert verdict.ok, worst(verdict)


@pytest.mark.parametrize(
    ("backend", "shape"),
    [
        ("jax", "qwen3_moe-some-dense"),
        *(("torch", name) for name in EXPERTS),
        *(("reference", name) for name in EXPERTS),
    ],
)
def test_routing_is_that_of_transformers(
    models: Callable[[str], tuple[Tiny, Reading]], backend: str, shape: str
) -> None:
    """Which experts take each token, the largest share first."""
    model, _ = models(shape)
    tokens, chosen = prompt(model, PROMPT), {}
    hooks = [
        module.register_forward_hook(lambda m, given, out, i=i: chosen.update({f"layers.{i}.routing": out[2].numpy()}))
        for i, layer in enumerate(model.hf.model.layers)
        for module in layer.modules()
        if type(module).__name__.endswith("TopKRouter")
    ]
    model.logits(tokens)
    for hook in hooks:
        hook.remove()
    sparse = [i for i, layer in enumerate(spec_of(model).layers) if isinstance(layer.feed, Experts)]
    assert list(chosen) == [f"layers.{i}.routing" for i in sparse]
    with opened(model, backend) as device:
        host = Host(device, taps=tuple(chosen))
        text = host.open()
        found = host.run([(text, host.row(text, tokens))]).taps
    for name, experts in chosen.items():
        np.testing.assert_array_equal(found[name], experts)


@pytest.mark.parametrize("shape", ["llama-rope-dynamic", "phi3-long", "phi3-short"])
def test_one_length_is_what_transformers_makes_of_it(models: Callable[[str], tuple[Tiny, Reading]], shape: str) -> None:
    """An engine that goes to 160 positions computes each sequence as transformers, left to itself, does one of 160."""
    model, _ = models(shape)
    tokens, length = prompt(model, 160), 160
    expected = model.logits(tokens).numpy()
    allowed = 2e-4 * max(1.0, float(expected.std()))
    for reach, same in ((length, True), (20, shape == "phi3-short")):
        with opened(model, "torch", fit(spec_of(model), reach)) as device:
            found = read_backend("torch", device, spec_of(model), tokens, 1).values["logits"]
        gap = float(np.abs(found - expected).max())
        assert gap <= allowed if same else gap > 10 * allowed


class Rolled:
    """Weights whose first dimension stands one further, where the parameter's name ends so: every query reads the
    wrong group, every token the wrong expert."""

    def __init__(self, source: WeightSource, *ends: str) -> None:
        self.source, self.ends = source, ends

    def read(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
        value = self.source.read(name, part)
        return np.roll(value, 1, axis=0) if name.endswith(self.ends) else value


class Shifted(Rope):
    """Frequencies that stand one pair further."""

    def frequencies(self) -> NDArray[np.float32]:
        return np.roll(super().frequencies(), 1)


def shifted(rope: Rope | None) -> Rope:
    return Shifted(**{f: getattr(rope, f) for f in Rope.__dataclass_fields__})


def mixers(spec: ModelSpec, change: Callable[[Attention], dict[str, Any]]) -> ModelSpec:
    layers = tuple(replace(layer, mixer=replace(layer.mixer, **change(layer.mixer))) for layer in spec.layers)
    return replace(spec, layers=layers)


def feeds(spec: ModelSpec, **change: Any) -> ModelSpec:
    return replace(spec, layers=tuple(replace(layer, feed=replace(layer.feed, **change)) for layer in spec.layers))


def wider(a: Attention) -> dict[str, Any]:
    return {"window": a.window + 1 if a.window else None}


HEADS, MATRICES = (".k", ".v", ".k_bias", ".v_bias"), (".gate", ".up", ".down")
Slip: TypeAlias = tuple[str, str, Callable[[ModelSpec], ModelSpec], tuple[str, ...]]
SLIPS: dict[str, Slip] = {
    "rope off by one": ("llama-grouped", ".attention", lambda s: mixers(s, lambda a: {"rope": shifted(a.rope)}), ()),
    "norm epsilon": ("llama-grouped", ".attention", lambda s: replace(s, norm_eps=1e-5), ()),
    "wrong head group": ("llama-grouped", ".attention", lambda s: s, HEADS),
    "window off by one": ("mistral-window", ".attention", lambda s: mixers(s, wider), ()),
    "soft cap off": ("gemma2-caps", ".attention", lambda s: mixers(s, lambda a: {"cap": None}), ()),
    "missing norm": (
        "gemma2-caps",
        ".mlp",
        lambda s: replace(s, layers=tuple(replace(x, sandwich=False) for x in s.layers)),
        (),
    ),
    "sink dropped": ("gpt_oss-sinks", ".attention", lambda s: mixers(s, lambda a: {"sinks": False}), ()),
    "wrong expert": ("mixtral-window", ".mlp", lambda s: s, MATRICES),
    # told by torch and the reference alone, but where all tests run
    "soft cap of logits off": ("gemma2-caps", "logits", lambda s: replace(s, logit_cap=None), ()),
    "embeddings not scaled": ("gemma2-caps", "embed", lambda s: replace(s, embed_scale=1.0), ()),
    "norms not from 1 on": ("gemma2-caps", ".attention", lambda s: replace(s, norm="plain"), ()),
    "heads not normed": ("gemma3-two-ropes", ".attention", lambda s: mixers(s, lambda a: {"qk_norm": False}), ()),
    "one rope for two kinds": (
        "gemma3-two-ropes",
        ".attention",
        lambda s: mixers(s, lambda a: {"rope": s.layers[1].mixer.rope}),
        (),
    ),
    "alternate windows swapped": (
        "gpt_oss-sinks",
        ".attention",
        lambda s: replace(s, layers=s.layers[::-1]),
        (),
    ),
    "gate not clamped": ("gpt_oss-sinks", ".mlp", lambda s: feeds(s, limit=100.0), ()),
    "shares not renormalised": ("mixtral-window", ".mlp", lambda s: feeds(s, renormalised=False), ()),
    "one expert less": ("mixtral-window", ".mlp", lambda s: feeds(s, top_k=1), ()),
    "magnitude of a long rope": (
        "phi3-long",
        ".attention",
        lambda s: mixers(s, lambda a: {"rope": replace(a.rope, magnitude=1.0)}),
        (),
    ),
    "short factors for long": ("phi3-long", ".attention", lambda s: fit(s, 24), ()),
    "all of a head rotated": (
        "phi3-long",
        ".attention",
        lambda s: mixers(s, lambda a: {"rope": replace(a.rope, kind="default", dim=16)}),
        (),
    ),
}
"""Slip -> the shape that it is planted in, the value of layer 0 (or the name) that it must show at first, the
description with it, and the ends of parameters that are rolled."""
PLANTED = [
    pytest.param(backend, slip, marks=[pytest.mark.slow] if backend == "jax" and i >= 8 else [])
    for backend in BACKENDS
    for i, slip in enumerate(SLIPS)
]


@pytest.mark.parametrize(("backend", "slip"), PLANTED)
def test_planted_slip_shows(models: Callable[[str], tuple[Tiny, Reading]], backend: str, slip: str) -> None:
    """Ten times past the tolerance, and told at the right place."""
    shape, at, change, rolled = SLIPS[slip]
    model, judge = models(shape)
    spec = spec_of(model)
    weights = Rolled(Checkpoint(model.path, spec), *rolled)
    with opened(model, backend, change(spec), weights) as device:
        reading = read_backend(backend, device, spec, prompt(model, PROMPT), 1)
    verdict = compare(replace(judge, tokens=judge.tokens[:1], margins=judge.margins[:1]), reading)
    assert not verdict.ok
    assert verdict.first == (at if at.isalpha() else f"layers.0{at}")
    assert verdict.gaps[-1].worst > 10 * verdict.gaps[-1].allowed, worst(verdict)


def test_margin_is_of_the_two_best() -> None:
    assert margin(np.array([1, 5, 4.5, 0], np.float32)) == pytest.approx(0.5)


def test_checkpoint_type_is_looked_at(tmp_path: Path) -> None:
    """A reference in bfloat16 would make every comparison green."""
    import torch

    model = tiny(tmp_path / "m", **SHAPES["llama-grouped"])
    model.hf.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    spec = read_spec(tmp_path / "half")
    reading = read_oracle(spec, tmp_path / "half", prompt(model, 4), 1)
    assert reading.values["embed"].dtype == np.float32
