"""The commands that print figures: what they say as JSON, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from engine.errors import ConfigError, InvalidRequest
from radixmesh.cli import make_app
from radixmesh.parity import compare
from tests.tiny import SHAPES, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny(tmp_path_factory.mktemp("model"), **SHAPES["qwen3-grouped"]).path)


def run(*args: str) -> Result:
    return CliRunner().invoke(make_app(), args)


def test_parity_agrees(model: str) -> None:
    done = run("parity", "--model", model, "--backends", "torch,reference,hf", "--tokens", "20", "--json")
    report = json.loads(done.stdout)
    assert done.exit_code == 0
    assert report["ok"]
    assert report["judge"] == "hf"
    assert [s["name"] for s in report["subjects"]] == ["torch", "reference"]
    assert [g["name"] for g in report["subjects"][0]["gaps"]][-2:] == ["final_norm", "logits"]
    assert all(s["first"] is None and s["differs"] is None for s in report["subjects"])


def test_parity_tells_the_first_difference(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "TOLERANCE", 1e-9)
    done = run("parity", "--model", model, "--backends", "torch,hf", "--tokens", "20")
    assert done.exit_code == 1
    assert "torch: first differs at layers.0.attention" in done.stdout


@pytest.mark.parametrize(
    ("args", "error", "said"),
    [
        (("--backends", "torch"), ConfigError, "at least two"),
        (("--backends", "torch,tpu"), ConfigError, "'tpu'"),
        (("--backends", "torch,hf", "--tokens", "600"), InvalidRequest, "600"),
    ],
)
def test_parity_refuses(model: str, args: tuple[str, ...], error: type[Exception], said: str) -> None:
    done = run("parity", "--model", model, *args)
    assert isinstance(done.exception, error)
    assert said in str(done.exception)


def test_bench_writes_where_it_was_made(model: str, tmp_path: Path) -> None:
    file = tmp_path / "results" / "agree.json"
    done = run(
        "bench",
        "agree",
        "--model",
        model,
        "--subjects",
        "torch,reference",
        "--count",
        "3",
        "--made",
        "4",
        "--out",
        str(file),
    )
    assert done.exit_code == 0, done.output
    record = json.loads(file.read_text())
    assert record["machine"]["cores"] > 0
    assert {"numpy", "torch"} <= set(record["versions"])
    assert [(f["kind"], f["equal"]) for f in record["figures"]] == [("greedy", 3), ("seeded", 3)]


def test_bench_offline_measures(model: str) -> None:
    done = run(
        "bench", "offline", "--model", model, "--subjects", "torch,transformers-float32", "--batch", "2",
        "--length", "8", "--made", "4", "--repeats", "1",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["torch", "transformers-float32"]
    assert all(min(float(row[2]), float(row[3])) > 0 for row in rows)


def test_bench_prefix_measures_both_ways(model: str, tmp_path: Path) -> None:
    file = tmp_path / "prefix.json"
    done = run(
        "bench", "prefix", "--model", model, "--subjects", "torch", "--requests", "3", "--shared", "64", "--own", "2",
        "--made", "2", "--repeats", "1", "--out", str(file), "--set", "sched.max_rows=2", "--set", "sched.slots=2",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    on, off = json.loads(file.read_text())["figures"]
    assert (on["radix"], off["radix"], on["prompt_tokens"]) == (True, False, 3 * 66)
    assert on["cached"] > off["cached"] == 0
