"""The workloads: the same requests for every engine, and a dry run of each."""

from __future__ import annotations

import json
import math
from hashlib import sha256
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.errors import ConfigError
from engine.model.params import params
from engine.model.registry import read_spec
from radixmesh.bench.workloads import SHAPES, make_config, workload
from radixmesh.cli import make_app

KNOWN = {
    "single": "bfe19e3e33b4310c919f84dd547c929a0a1052cc9c2ba090e1f849de3a5c738d",
    "throughput": "c710f1b48b0d21fe00c0032aa675673ae9ccc9c615728883c1810f535a75de9f",
    "shared": "e73b7a068724bc95f5bf00e99c1ed79f26e657b74b030f641cdec0684637a726",
}
"""Of the requests that vLLM and SGLang were measured with."""


@pytest.mark.parametrize("name", KNOWN)
def test_requests_are_those_that_the_peers_had(name: str) -> None:
    assert sha256(json.dumps(workload(name).prompts).encode()).hexdigest() == KNOWN[name]


def test_names_and_shapes_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="single, throughput, shared"):
        workload("latency")
    with pytest.raises(ConfigError, match="8b, 1b, 30b-a3b"):
        make_config(tmp_path, "9b")


def test_config_alone_describes_the_model(tmp_path: Path) -> None:
    spec = read_spec(make_config(tmp_path, "8b"))
    assert (len(spec.layers), spec.hidden, spec.layers[0].mixer.kv_heads, spec.dtype) == (32, 4096, 8, "bfloat16")
    spec = read_spec(make_config(tmp_path, "30b-a3b"))
    weights = sum(math.prod(p.shape) for p in params(spec).values())
    assert (spec.family, weights) == ("qwen3_moe", 30_532_122_624)  # as its model card has it, 30.5 billion
    for name in SHAPES:
        made = read_spec(make_config(tmp_path / "all", name))
        assert len(made.layers) == SHAPES[name]["num_hidden_layers"], name


def test_dry_run_writes_figures(tmp_path: Path) -> None:
    """The demo's shape with random weights; the second prompt of a group finds its prefix in the cache, the second
    repeat doesn't find the first."""
    (tmp_path / "config.json").write_bytes(
        (Path(__file__).parent.parent / "radixmesh" / "demo" / "config.json").read_bytes()
    )
    out = tmp_path / "out.json"
    line = (
        "bench offline --workload single,shared --backend reference --dummy --scale 0.03 --repeats 2 --set cache.page=4"
    )
    result = CliRunner().invoke(make_app(), [*line.split(), "--model", str(tmp_path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    single, shared = json.loads(out.read_text())["figures"]
    assert (single["output_tokens"], single["cached"], single["steps"]) == (7, 0, 7)
    assert single["ms_per_token"] > 0
    assert (shared["requests"], shared["input_tokens"]) == (2, 2 * (61 + 3))
    assert shared["cached"] == 60
