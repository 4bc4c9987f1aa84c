"""Kernels of GPUs compiled with none here. They need torch and triton, which `make test-next` has not."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from backends import target
from backends.target import check
from engine.errors import ConfigError
from engine.target import Target
from tests.compile.test_command import MODELS, call, check_one_line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("compile", "--target", "rocm:gfx942", "--set", "backend.name=jax"), "jax has no kernels for rocm:gfx942"),
        (("compile", "--target", "cuda:sm_90", "--mesh", "tp=8"), "does not divide q_heads=4"),
    ],
)
def test_bad_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    check_one_line(monkeypatch, capsys, arguments, says)


def test_the_demo_model_on_a_gpu_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every kernel with what the compiler says of it; one that does not compile is an exit code."""
    from kernels_cuda import build

    files = ("--out", str(tmp_path / "r.json"), "--html", str(tmp_path / "p.html"))
    command = ("compile", "--target", "rocm:gfx942", "--set", "model.max_len=128", *files)
    assert call(monkeypatch, *command) == 0
    made = json.loads((tmp_path / "r.json").read_text())
    assert made["layers"] == [{"layer": "4/2 heads of 64", "plain": ""}]
    assert {"norm", "gated", "rope_write", "row", "largest", "look", "settle", "tree"} <= {
        k["case"].split()[0] for k in made["kernels"]
    }
    assert len(made["kernels"]) == 26
    page = (tmp_path / "p.html").read_text()
    for kernel in made["kernels"]:
        assert kernel["case"] in page
        assert kernel["compile_s"] >= 0
        assert 0 <= kernel["shared"] <= 1 << 16
        assert kernel["registers"] > 0
        assert kernel["spilled"] == 0
    assert "26 kernels, 0 failed, 0 spill" in capsys.readouterr().out

    monkeypatch.setattr(build, "build", lambda case, arch: {"case": case.name, "arch": arch, "error": "too large"})
    assert call(monkeypatch, *command, "--json") == 1
    assert not json.loads(capsys.readouterr().out)["ok"]


@pytest.mark.parametrize(
    ("target", "card", "memory"),
    [
        ("cuda:sm_90", "H100 (sm_90", 80),
        ("cuda:sm_90:h200", "H200 (sm_90", 141),
        ("rocm:gfx942", "MI300X (gfx942", 192),
        ("rocm:gfx950", "MI355X (gfx950", 288),
    ],
)
def test_explain_says_what_a_gpu_would_decide(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str, card: str, memory: int
) -> None:
    """The card's memory is what weights, cache and captured steps are planned in."""
    assert call(monkeypatch, "explain", "--target", target, "--model", str(MODELS / "llama-3.1-8b"), "--json") == 0
    made = json.loads(capsys.readouterr().out)
    said = {d["field"]: d for d in made["decisions"]}
    assert said["backend"] == {"field": "backend", "value": "torch", "why": "target"}
    assert said["platform"]["why"] == f"1 x {card}, by its data sheet), {memory * 1e9 / 2**30:.1f} GiB free"
    assert 0.8 * memory * 1e9 < made["memory"]["total"] < 0.9 * memory * 1e9
    arch = target.split(":")[1]
    (layers,) = made["layers"]
    assert layers["layers"] == [0, 31]
    assert layers["kernel"].startswith(f"Triton over pages on {arch}, head 128, bfloat16 cache, ")
    assert layers["kernel"].endswith(", shared prefixes once for all rows where it pays")
    assert ("Hopper" in layers["kernel"]) == (arch == "sm_90")


def test_explain_of_a_gpu_tells_what_a_mesh_and_jax_would_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(MODELS / "llama-3.1-70b")
    assert call(monkeypatch, "explain", "--target", "cuda:sm_90", "--mesh", "tp=4", "--model", model, "--json") == 0
    said = {d["field"]: d["why"] for d in json.loads(capsys.readouterr().out)["decisions"]}
    assert said["platform"].startswith("4 x H100")
    check_one_line(monkeypatch, capsys, ("explain", "--target", "cuda:sm_90", "--model", model), "of 74.51 GiB free")
    assert call(monkeypatch, "explain", "--target", "cuda:sm_90", "--backend", "jax") == 0
    assert "Pallas by way of Triton, head 64" in capsys.readouterr().out


def test_gpus_need_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    check(Target.parse("rocm:gfx942"))
    monkeypatch.setattr(target, "version", lambda name: "" if name == "triton" else version(name))
    with pytest.raises(ConfigError, match=r"triton is not installed: pip install 'radixmesh\[rocm\]'"):
        check(Target.parse("rocm:gfx942"))
