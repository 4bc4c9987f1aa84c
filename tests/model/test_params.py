"""Parameters and how a mesh splits them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import ConfigError
from engine.mesh import RULES, MeshSpec, shard_slices
from engine.model.checkpoint import Checkpoint
from engine.model.params import params
from engine.model.registry import read_spec
from engine.model.weights import RandomWeights, WeightSource
from tests.tiny import SHAPES, tiny


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = tiny(tmp_path, **SHAPES[name])
    found = params(read_spec(tmp_path))
    assert sum(math.prod(p.shape) for p in found.values()) == sum(p.numel() for p in model.hf.parameters())
    for key, p in found.items():
        assert key == p.name
        assert len(p.axes) == len(p.shape)
        assert set(p.axes) <= set(RULES)


def test_shapes_and_axes(tmp_path: Path) -> None:
    tiny(tmp_path, hidden=96, q_heads=6, kv_heads=2, head_dim=10, ffn=50, vocab=193, layers=2, bias=True)
    found = {n: dict(zip(p.axes, p.shape, strict=True)) for n, p in params(read_spec(tmp_path)).items()}
    assert found["embed"] == found["head"] == {"vocab": 193, "hidden": 96}
    assert found["layers.1.attention.q"] == {"q_heads": 6, "head": 10, "hidden": 96}
    assert found["layers.1.attention.k"] == found["layers.0.attention.v"] == {"kv_heads": 2, "head": 10, "hidden": 96}
    assert found["layers.1.attention.out"] == {"hidden": 96, "q_heads": 6, "head": 10}
    assert found["layers.0.attention.q_bias"] == {"q_heads": 6, "head": 10}
    assert found["layers.0.attention.out_bias"] == found["final_norm"] == {"hidden": 96}
    assert found["layers.0.mlp.gate"] == found["layers.0.mlp.up"] == {"ffn": 50, "hidden": 96}
    assert found["layers.0.mlp.down"] == {"hidden": 96, "ffn": 50}
    assert found["layers.0.mlp.gate_bias"] == {"ffn": 50}


PLAIN = {"hidden": 64, "q_heads": 8, "kv_heads": 4, "bias": True, "ffn": 72}
WITH_EXPERTS = SHAPES["gpt_oss-sinks"] | {"kv_heads": 4}


@pytest.mark.parametrize("kind", ["checkpoint", "random"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("shape", "many"), [(PLAIN, 26), (WITH_EXPERTS, 28)], ids=["plain", "experts"])
def test_the_shards_of_a_parameter_make_the_whole(
    kind: str, tp: int, shape: dict[str, Any], many: int, tmp_path: Path
) -> None:
    tiny(tmp_path, **shape)
    spec, mesh = read_spec(tmp_path), MeshSpec(tp=tp)
    source: WeightSource = Checkpoint(tmp_path, spec) if kind == "checkpoint" else RandomWeights(spec, seed=3)
    split = 0
    for p in params(spec).values():
        whole = source.read(p.name, tuple(slice(None) for _ in p.shape))
        assert whole.shape == p.shape
        cuts = [shard_slices(p.shape, p.axes, mesh, {"tp": i}) for i in range(tp)]
        parts = [source.read(p.name, cut) for cut in cuts]
        over = [i for i, axis in enumerate(p.axes) if RULES[axis] == "tp"]
        if over and tp > 1:
            split += 1
            assert math.prod(parts[0].shape) * tp == math.prod(p.shape)
            np.testing.assert_array_equal(np.concatenate(parts, over[0]), whole)
        else:
            for part in parts:
                np.testing.assert_array_equal(part, whole)
    assert split == (0 if tp == 1 else many)  # all but norms, routers and biases of outputs


def test_a_mesh_that_divides_no_heads_is_refused() -> None:
    with pytest.raises(ConfigError, match="tp=4 does not divide kv_heads=2"):
        shard_slices((2, 16, 64), ("kv_heads", "head", "hidden"), MeshSpec(tp=4), {"tp": 0})


def test_the_mesh_grammar() -> None:
    assert MeshSpec.parse("") == MeshSpec()
    assert MeshSpec.parse(" dp=2, pp=3 ,tp=4") == MeshSpec(dp=2, pp=3, tp=4)
    assert MeshSpec.parse("dp=2,tp=4,ep=8").size == 8
    assert str(MeshSpec.parse("tp=4,dp=2")) == "dp=2,tp=4"
    assert MeshSpec.parse(str(MeshSpec(dp=2, ep=4))) == MeshSpec(dp=2, ep=4)
    assert str(MeshSpec()) == "tp=1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("xp=2", "unknown axis 'xp'; the axes are dp, pp, tp, ep"),
        ("2", "unknown axis '2'"),
        ("tp", "tp must be a positive integer, not ''"),
        ("tp=0", "tp must be a positive integer, not '0'"),
        ("tp=-1", "tp must be a positive integer, not '-1'"),
        ("dp=1.5", "dp must be a positive integer, not '1.5'"),
        ("tp=²", "tp must be a positive integer"),
        ("tp=2,dp=1,tp=2", "axis tp is given twice"),
        ("tp=2;dp=2", "tp must be a positive integer"),
    ],
)
def test_a_mesh_that_does_not_parse(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as e:
        MeshSpec.parse(text)
    assert words in str(e.value)
    assert e.value.field == "mesh"
