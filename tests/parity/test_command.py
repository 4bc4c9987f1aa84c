"""The commands that print figures: what they say as JSON, and their exit codes."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from engine.errors import ConfigError, InvalidRequest, ModelError
from engine.mesh import MeshSpec
from engine.model.checkpoint import Checkpoint
from engine.model.spec import ModelSpec, Rope
from engine.model.weights import WeightSource
from engine.run.start import Decided
from radixmesh.cli import make_app
from radixmesh.commands import parity as command
from radixmesh.engine import DEMO
from radixmesh.parity import read, texts
from radixmesh.parity.thresholds import FILE
from tests.tiny import SHAPES, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny(tmp_path_factory.mktemp("model"), **SHAPES["qwen3-grouped"]).path)


def run(*args: str) -> Result:
    return CliRunner().invoke(make_app(), args)


def test_parity_agrees(model: str, tmp_path: Path) -> None:
    out, html = tmp_path / "made" / "p.json", tmp_path / "p.html"
    done = run(
        "parity", "--model", model, "--backends", "torch,reference,hf", "--tokens", "300", "--json",
        "--out", str(out), "--html", str(html),
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert done.exit_code == 0, report["subjects"][0]["checks"]
    assert report == json.loads(out.read_text())
    assert report["ok"]
    assert report["judge"] == "hf"
    assert [s["name"] for s in report["subjects"]] == ["torch", "reference"]
    for s in report["subjects"]:
        assert [g["name"] for g in s["gaps"]][-2:] == ["final_norm", "logits"]
        assert 0 < s["gaps"][-1]["worst"] < s["gaps"][-1]["allowed"]
        assert s["first"] is None
        assert s["greedy"] == {"equal": 1, "near": 0, "faults": [], "differs": [None]}
        assert [(b["first"], b["count"]) for b in s["buckets"]] == [(0, 128), (128, 172)]
        assert 0 < s["summary"]["kl_mean"] <= s["summary"]["kl_p99"] <= s["summary"]["kl_max"] < 1e-8
        assert len(s["kl"][0]) == 300
        assert all(c["ok"] for c in s["checks"])
    assert report["made"]["versions"]["torch"]
    _page(html.read_text(), ["torch", "reference"])


def _page(html: str, subjects: list[str]) -> None:
    """Nothing from elsewhere, no script; every chart is well-formed and has every subject."""
    assert "<script" not in html
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
    charts = {}
    for part in html.split("<svg")[1:]:
        root = ET.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")
        charts[root.attrib["aria-label"]] = [e.attrib.get("class", "") for e in root.iter()]
    assert set(charts) == {"error by layer", "KL by position", "KL by context", "overlap"}
    for classes in charts.values():
        assert all(any(c in (f"line c{i}", f"bar c{i}") for c in classes) for i in range(len(subjects)))
    assert all(f"<th>{name}</th>" in html for name in subjects)


def test_parity_tells_the_first_difference(model: str, tmp_path: Path) -> None:
    strict = tmp_path / "strict.toml"
    strict.write_text(FILE.read_text().replace("value = 2e-4", "value = 1e-9", 1))
    args = ("--model", model, "--backends", "torch,hf", "--tokens", "20")
    done = run("parity", *args, "--thresholds", str(strict))
    assert done.exit_code == 1
    assert "torch: first differs at layers.0.attention" in done.stdout
    assert "NOT OK" in done.stdout


def test_parity_of_two_dtypes(model: str) -> None:
    """The judge is the first; bfloat16 is off by what bfloat16 is off by, and not by nothing."""
    done = run("parity", "--model", model, "--a", "torch", "--b", "hf:bfloat16", "--tokens", "60", "--json")
    report = json.loads(done.stdout)
    assert done.exit_code == 0, report["subjects"][0]["checks"]
    assert report["judge"] == "torch"
    (s,) = report["subjects"]
    assert (s["name"], s["dtype"]) == ("hf:bfloat16", "bfloat16")
    assert s["gaps"][-1]["worst"] > 1e-3
    assert s["summary"]["kl_mean"] > 1e-7


class Changed:
    """Weights whose parameters are renamed or rearranged."""

    def __init__(self, source: WeightSource, name: Callable[[str], str], value: Callable[[str, Any], Any]) -> None:
        self.source, self.name, self.value = source, name, value

    def read(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
        return np.asarray(self.value(name, self.source.read(self.name(name), part)))


class Late(Rope):
    """Frequencies that stand one pair further."""

    def frequencies(self) -> NDArray[np.float32]:
        return np.roll(super().frequencies(), 1)


def _late(spec: ModelSpec) -> ModelSpec:
    def late(rope: Rope) -> Rope:
        return Late(**{f: getattr(rope, f) for f in Rope.__dataclass_fields__})

    layers = [replace(x, mixer=replace(x.mixer, rope=late(x.mixer.rope))) for x in spec.layers if x.mixer.rope]
    return replace(spec, layers=tuple(layers))


def _swap(name: str) -> str:
    """Layer 0's feed-forward is layer 1's, and the reverse."""
    for i, j in ((0, 1), (1, 0)):
        if name.startswith(f"layers.{i}.mlp."):
            return name.replace(f"layers.{i}.", f"layers.{j}.")
    return name


def _roll(name: str, value: Any) -> Any:
    """Key-value heads of the last layer stand one further: every query there reads the wrong group."""
    return np.roll(value, 1, axis=0) if name in ("layers.1.attention.k", "layers.1.attention.v") else value


SLIPS: dict[str, tuple[str, Callable[[ModelSpec], ModelSpec], Callable[[str], str], Callable[[str, Any], Any]]] = {
    "rope off by one": ("layers.0.attention", _late, str, lambda n, v: v),
    "norm eps": ("layers.0.attention", lambda s: replace(s, norm_eps=1e-5), str, lambda n, v: v),
    "swapped layers": ("layers.0.mlp", lambda s: s, _swap, lambda n, v: v),
    "swapped head groups": ("layers.1.attention", lambda s: s, str, _roll),
}


@pytest.mark.parametrize("slip", SLIPS)
@pytest.mark.parametrize("subject", ["torch", "torch:bfloat16"])
def test_parity_catches_a_planted_slip(model: str, subject: str, slip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1, told at the right place, and the logits' figures are past their thresholds too. Of another epsilon
    bfloat16 shows nothing: it is as small as its rounding."""
    where, bend, name, value = SLIPS[slip]
    decide = read.decide

    def bent(*args: Any) -> Decided:
        decided = decide(*args)
        return replace(decided, spec=bend(decided.spec))

    monkeypatch.setattr(read, "decide", bent)
    monkeypatch.setattr(read, "Checkpoint", lambda path, spec: Changed(Checkpoint(path, spec), name, value))
    done = run("parity", "--model", model, "--a", "hf", "--b", subject, "--tokens", "40", "--json")
    (s,) = json.loads(done.stdout)["subjects"]
    if (subject, slip) == ("torch:bfloat16", "norm eps"):
        assert done.exit_code == 0
        return
    assert done.exit_code == 1
    assert s["first"] == where
    assert s["gaps"][-1]["worst"] > (10 if subject == "torch" else 1) * s["gaps"][-1]["allowed"]
    assert {"kl_mean", "kl_p99", "kl_max"} <= {c["metric"] for c in s["checks"] if not c["ok"]}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny(tmp_path_factory.mktemp("mixed"), **SHAPES["mixtral-window"]).path)


def test_experts_are_pinned(mixed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 some tokens go to other experts. The judge goes with them, or the values beside would not compare."""
    args = (
        "parity",
        "--model",
        mixed,
        "--a",
        "hf",
        "--b",
        "torch:bfloat16",
        "--b",
        "torch",
        "--tokens",
        "200",
        "--json",
    )
    done = run(*args)
    half, full = json.loads(done.stdout)["subjects"]
    assert done.exit_code == 0, half["checks"]
    assert set(half["experts_changed"]) == {"layers.0.routing", "layers.1.routing"}
    assert 0 < max(half["experts_changed"].values()) < 0.1
    assert set(full["experts_changed"].values()) == {0}
    assert half["experts_pinned"]
    assert full["experts_pinned"]
    monkeypatch.setattr(command, "_pin", lambda *_: None)
    free = json.loads(run(*args).stdout)["subjects"][0]
    assert not free["experts_pinned"]
    assert free["experts_changed"] == half["experts_changed"]
    worst = [max(g["worst"] / g["allowed"] for g in s["gaps"]) for s in (half, free)]
    assert worst[0] < 1 < 2 < worst[1], worst


@pytest.mark.parametrize("subject", ["torch", "torch:bfloat16"])
def test_parity_catches_a_swapped_expert(mixed: str, subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two experts of the last layer stand in each other's place."""

    def swap(name: str, value: Any) -> Any:
        inside = name.startswith("layers.1.moe.") and name.endswith((".gate", ".up", ".down"))
        return value[[1, 0, *range(2, len(value))]] if inside else value

    monkeypatch.setattr(read, "Checkpoint", lambda path, spec: Changed(Checkpoint(path, spec), str, swap))
    done = run("parity", "--model", mixed, "--a", "hf", "--b", subject, "--tokens", "40", "--json")
    assert done.exit_code == 1
    (s,) = json.loads(done.stdout)["subjects"]
    assert s["first"] == "layers.1.mlp"
    assert s["gaps"][-1]["worst"] > (10 if subject == "torch" else 1) * s["gaps"][-1]["allowed"]
    assert {"kl_mean", "kl_p99", "kl_max", "overlap"} <= {c["metric"] for c in s["checks"] if not c["ok"]}


def test_parity_says_what_is_not_a_number(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(name: str, value: Any) -> Any:
        return value * np.float32(np.nan) if name == "layers.1.mlp.down" else value

    monkeypatch.setattr(read, "Checkpoint", lambda path, spec: Changed(Checkpoint(path, spec), str, spoil))
    html = tmp_path / "p.html"
    args = ("--model", model, "--a", "hf", "--b", "torch", "--tokens", "9", "--html", str(html))
    done = run("parity", *args, "--json")
    assert done.exit_code == 1, done.exception
    (s,) = json.loads(done.stdout)["subjects"]
    assert s["first"] == "layers.1.mlp"
    assert (s["gaps"][-1]["worst"], s["summary"]["kl_mean"]) == (None, None)
    assert "not a number" in html.read_text()
    _page(html.read_text(), [])


def test_a_reference_in_another_dtype_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a library would that follows the checkpoint and not what was asked: every comparison would be green."""
    right = AutoModelForCausalLM.from_pretrained

    def wrong(path: Any, **kwargs: Any) -> Any:
        return right(path, **(kwargs | {"dtype": torch.bfloat16}))

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", wrong)
    done = run("parity", "--model", model, "--backends", "hf,reference", "--tokens", "8")
    assert isinstance(done.exception, ModelError)
    assert "loaded torch.bfloat16 where float32 was asked for" in str(done.exception)


def test_a_mesh_has_a_process_of_its_own(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is broken here works there, and the reading that comes back is the same."""
    settings, ids = read.Settings(path=model, count=3), [list(range(12)), [5, 4, 3]]
    one = read.Subject(name="hf", backend="hf")
    here = read.read_texts(one, settings, ids)

    def broken(*args: Any) -> Any:
        raise AssertionError("read in this process")

    monkeypatch.setattr(read, "open_oracle", broken)
    with pytest.raises(AssertionError, match="in this process"):
        read.read_texts(one, settings, ids)
    there = read.read_texts(replace(one, mesh=MeshSpec(tp=2)), settings, ids)
    assert [r.tokens for r in there] == [r.tokens for r in here]
    assert [set(r.values) == {"logits"} for r in there] == [False, True]  # inner values of the first text alone
    for a, b in zip(there, here, strict=True):
        for name, value in b.values.items():
            np.testing.assert_allclose(a.values[name], value, atol=1e-5)


def test_packaged_texts_are_cut_and_say_so() -> None:
    decided = read.Settings(path=None, count=32).decide(read.Subject(name="torch", backend="torch"))
    whole = texts.pick(decided, None, 0, 0, 32)
    assert [t.name for t in whole] == ["short", "prose", "code"]
    assert [t.cut for t in whole] == [0, 0, 0]
    assert len(whole[-1].ids) > 512  # three buckets of context on the demo model
    short = replace(decided, resolved=replace(decided.resolved, max_len=200))
    cut = texts.pick(short, None, 0, 0, 32)
    assert [len(t.ids) for t in cut] == [len(whole[0].ids), 168, 168]
    assert [t.cut for t in cut] == [0, len(whole[1].ids) - 168, len(whole[2].ids) - 168]
    with pytest.raises(InvalidRequest, match="must be at least 1 each and fit 200"):
        texts.pick(short, ["x = 1\n" * 200], 0, 0, 32)
    assert decided.path == DEMO


@pytest.mark.parametrize(
    ("args", "error", "said"),
    [
        (("--backends", "torch"), ConfigError, "at least two"),
        (("--backends", "torch,tpu"), ConfigError, "'tpu'"),
        (("--backends", "torch,hf", "--tokens", "600"), InvalidRequest, "600"),
        (("--backends", "torch,hf", "--tokens", "6", "--prompt", "a"), ConfigError, "one of them"),
        (("--a", "jax"), ConfigError, "give both"),
        (("--a", "hf", "--b", "reference:bfloat16", "--tokens", "6"), ConfigError, "reference computes in float32"),
        (("--a", "hf", "--b", "torch", "--thresholds", "/nowhere.toml"), ConfigError, "/nowhere.toml"),
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
        "--length", "8", "--made", "12", "--repeats", "1", "--threads", "1",
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
