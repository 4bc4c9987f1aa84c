"""Random weights for benchmarks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from engine.errors import ModelError
from engine.model.archs import llama
from engine.model.params import params
from engine.model.registry import read_spec
from engine.model.spec import ModelSpec
from engine.model.weights import RandomWeights
from tests.tiny import tiny


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    tiny(tmp_path, hidden=96, q_heads=6, kv_heads=2, head_dim=32, vocab=2048, ffn=384, bias=True)
    return replace(read_spec(tmp_path), dtype="bfloat16")


def read(source: RandomWeights, spec: ModelSpec, name: str) -> np.ndarray:
    return source.read(name, tuple(slice(None) for _ in params(spec)[name].shape))


def test_the_same_seed_gives_the_same_weights_and_another_others(spec: ModelSpec) -> None:
    a, b, c = RandomWeights(spec, 1), RandomWeights(spec, 1), RandomWeights(spec, 2)
    for name in reversed(params(spec)):
        read(b, spec, name)  # in another order
    seen = set()
    for name, p in params(spec).items():
        values = read(a, spec, name)
        assert values.shape == p.shape
        assert values.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(values, read(b, spec, name))
        if name.endswith("norm"):
            assert (values == 1).all()
            continue
        assert (values != read(c, spec, name)).mean() > 0.9
        seen.add(values.tobytes()[:64])
    assert len(seen) == sum(not name.endswith("norm") for name in params(spec))


def test_the_scale_keeps_activations_in_size(spec: ModelSpec) -> None:
    fan_in = {
        "embed": 96,
        "head": 96,
        "layers.0.attention.q": 96,
        "layers.0.attention.out": 192,
        "layers.1.mlp.down": 384,
    }
    source = RandomWeights(spec, 0)
    for name, n in fan_in.items():
        values = read(source, spec, name).astype(np.float64)
        assert abs(values.std() * n**0.5 - 1) < 0.05
        assert abs(values.mean() * n**0.5) < 0.05
        flat = values.reshape(-1, values.shape[-1])
        assert len(np.unique(flat, axis=0)) == len(flat)
    values = read(RandomWeights(spec, 0, std=0.02), spec, "layers.1.mlp.down").astype(np.float64)
    assert abs(values.std() / 0.02 - 1) < 0.05


def test_rows_are_independent(spec: ModelSpec) -> None:
    rows = read(RandomWeights(replace(spec, dtype="float32"), 0), spec, "embed").astype(np.float64)
    found = np.corrcoef(rows[:256])
    off = found[~np.eye(256, dtype=bool)]
    assert abs(off.std() * 96**0.5 - 1) < 0.05
    assert abs(off).max() < 0.6


def test_only_the_slice_is_made() -> None:
    sizes = {"vocab_size": 1 << 40, "hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 1}
    spec = llama.spec(sizes | {"num_attention_heads": 32})
    part = RandomWeights(spec, 0).read("embed", (slice((1 << 39) + 5, (1 << 39) + 8), slice(10, 14)))
    assert part.shape == (3, 4)
    assert np.isfinite(part).all()


def test_a_name_that_is_no_parameter(spec: ModelSpec) -> None:
    with pytest.raises(ModelError, match="nothing"):
        RandomWeights(spec, 0).read("nothing", ())
