"""`radixmesh compile`, `plan` and `explain --target`, as one calls them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest

from backends import target
from engine.config import Resolved, load
from engine.errors import BackendLost
from engine.model.spec import ModelSpec
from engine.run.start import Decided
from engine.target import Target
from radixmesh import cli
from radixmesh.compile import gpu, run
from radixmesh.engine import DEMO

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "benchmarks" / "golden" / "models"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a command line, run here."""
    monkeypatch.setattr(sys, "argv", ["radixmesh", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def check_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], says: str
) -> None:
    """A command line is refused, in one line that says why."""
    assert call(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.count("\n") == 1
    assert not said.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("compile",), "give --target, such as tpu:v6e:2x4, or --all-targets"),
        (("compile", "--target", "cpu", "--all-targets"), "give --target"),
        (("compile", "--target", "tpu:v6e"), "is no TPU with a topology"),
        (("compile", "--target", "tpu:v66:2x4"), "did you mean v6e?"),
        (("compile", "--target", "tpu:v6e:2x4", "--mesh", "tp=3"), "not divided by tp=3"),
        (("compile", "--target", "tpu:v6e:2x4", "--mesh", "tp=16"), "not divided by tp=16"),
        (("compile", "--target", "tpu:v6e:2x4", "--mesh", "tp=8"), "does not divide q_heads=4"),
        (("compile", "--target", "tpu:v6e:2x4", "--mesh", "dp=2"), "dp=2 is not built yet"),
        (("compile", "--target", "cuda:sm_90", "--only", "steps"), "only and bundle are for programs"),
        (("compile", "--target", "cpu", "--only", "some"), "'some' is none of all, steps"),
        (("compile", "--target", "cpu", "--update"), "give --golden too"),
        (("compile", "--target", "cpu", "--set", "backend.name=torch"), "torch runs no compiled programs"),
        (("compile", "--target", "cpu", "--only", "steps", "--bundle", "x"), "holds all programs of one target"),
        (("compile", "--all-targets", "--bundle", "x"), "holds all programs of one target"),
        (("compile", "--target", "cpu", "--bundle", str(ROOT / "docs")), "in it and is no bundle; give a new folder"),
        (("compile", "--target", "cpu", "--model", "/nowhere"), "/nowhere: does not exist"),
        (("compile", "--target", "tpu:v5e:2x4", "--mesh", "tp=8", "--model", str(MODELS / "llama-3.1-70b")),
         "3.04 GiB more than"),
        (("plan", "--target", "cpu"), "plan knows chips of TPUs"),
        (("explain", "--target", "cuda:sm_90", "--backend", "reference"), "reference does not run on cuda:sm_90"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    check_one_line(monkeypatch, capsys, arguments, says)


@pytest.mark.parametrize(
    ("libtpu", "says"), [("", "libtpu is not installed"), ("0.0.7", "libtpu 0.0.7 is the wrong version")]
)
def test_a_libtpu_that_is_missing_or_of_another_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], libtpu: str, says: str
) -> None:
    goes, jax = target.wanted(requires("jax") or []), version("jax")
    monkeypatch.setattr(target, "version", lambda name: libtpu if name == "libtpu" else version(name))
    assert call(monkeypatch, "compile", "--target", "tpu:v6e:2x2") == 2
    assert goes
    fix = f"jax {jax} goes with libtpu {goes}: pip install 'jax[tpu]=={jax}'"
    assert capsys.readouterr().err == f"radixmesh: target: {says}; {fix}\n"


def test_the_demo_model_on_this_cpu(tmp_path: Path) -> None:
    """All programs of a small configuration, in JSON and as a page, and an exit code for CI."""
    command = [sys.executable, "-m", "radixmesh", "compile", "--target", "cpu", "--set", "sched.max_tokens=32",
               "--set", "sched.token_buckets=[32]", "--set", "sched.slots=4"]  # fmt: skip
    files = ["--out", str(tmp_path / "a" / "r.json"), "--html", str(tmp_path / "p.html")]
    files += ["--bundle", str(tmp_path / "b")]
    ran = subprocess.run([*command, *files, "--temp", "64"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    report = json.loads((tmp_path / "a" / "r.json").read_text())
    assert report["ok"]
    kinds = {p["kind"] for p in report["programs"]}
    assert kinds == {"step", "empty", "edit", "copy", "count", "score", "choose"}
    assert report["held"]["cache"] > report["held"]["weights"] > 0
    assert {g["name"] for g in report["gates"]} == {"alias", "temporaries", "collectives"}
    page = (tmp_path / "p.html").read_text()
    assert page.count("<html") == 1
    assert not re.search(r'(?:src|href)="', page), "a page stands alone"
    for p in report["programs"]:
        assert p["program"].split(" ")[0] in page
    assert "step 32" in ran.stdout
    kept = json.loads((tmp_path / "b" / "manifest.json").read_text())["programs"]
    assert sorted(p["kind"] for p in kept) == sorted(p["kind"] for p in report["programs"])
    size = sum(f.stat().st_size for f in (tmp_path / "b").glob("*.xla"))
    assert f"{tmp_path / 'b'}: {len(kept)} programs, {size / 2**20:.1f} MiB" in ran.stdout

    failing = [*command, "--only", "decode", "--temp", "1", "--json"]
    ran = subprocess.run(failing, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode in (0, 1), ran.stderr[-2000:]
    report = json.loads(ran.stdout)
    assert [p["kind"] for p in report["programs"]] == ["step"]
    assert report["ok"] == (ran.returncode == 0) == (report["programs"][0]["temp"] <= 1 << 20)


def test_plan_chooses_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--out", str(tmp_path / "r.json"), "--html", str(tmp_path / "p.html"))
    asked = ("plan", "--target", "tpu:v6e", "--model", str(MODELS / "llama-3.1-8b"))
    assert call(monkeypatch, *asked, "--latency", "4", *files) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert f"smallest that gives 4 ms: {report['best']} on" in said
    chosen = next(o for o in report["options"] if o["mesh"] == report["best"])
    smaller = [o for o in report["options"] if not o["refused"] and o["weights"] > chosen["weights"]]
    assert chosen["one_ms"] <= 4 < min(o["one_ms"] for o in smaller)
    page = (tmp_path / "p.html").read_text()
    assert page.count("<svg") == 2
    assert call(monkeypatch, *asked, "--latency", "0.0001") == 1
    assert "none gives 0.0001 ms" in capsys.readouterr().out


def test_explain_says_what_a_target_would_decide(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--mesh", "tp=8", "--model", str(MODELS / "llama-3.1-8b"), "--json")
    monkeypatch.setattr(sys, "argv", ["radixmesh", "explain", "--target", "tpu:tpu7x:2x2x1", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    said = {d["field"]: d for d in json.loads(capsys.readouterr().out)["decisions"]}
    assert said["platform"]["why"] == "8 x TPU7x, 94.8 GiB free for each device"
    assert said["stack"]["why"] == "on a TPU7x a scan copies stacked bfloat16 weights in each step"


def test_explain_tells_the_kernel_of_the_chip_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """128 heads of 256 fit the VMEM of v6e and not the half of it that v5p has."""
    sizes = {"num_attention_heads": 128, "num_key_value_heads": 16, "head_dim": 256, "vocab_size": 1024}
    given = json.loads((MODELS / "llama-3.1-8b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(given | sizes | {"num_hidden_layers": 2}))
    said = {}
    asked = ("--model", str(tmp_path), "--set", "cache.tokens=8192")
    for chip in ("tpu:v6e:2x2", "tpu:v5p:2x2x1"):
        assert call(monkeypatch, "explain", "--target", chip, *asked) == 0
        said[chip] = capsys.readouterr().out.splitlines()[-1]
    assert (
        said["tpu:v6e:2x2"] == "layers 0-1: Pallas, head 256, bfloat16 cache: ragged pages, written and read in place"
    )
    assert said["tpu:v5p:2x2x1"] == (
        "layers 0-1: plain XLA, head 256, bfloat16 cache: 128 heads of 256 over 16 kv heads do not fit the 67108864 "
        "bytes of VMEM of v5p"
    )


def test_of_all_targets_those_that_cannot_hold_a_model_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The others are compiled all the same. 70B on eight chips; what the compiler says is made up."""
    held = dict.fromkeys(("weights", "cache", "state", "counts"), 1 << 20)
    compiled = []

    def records(decided: Decided, target: Target, only: str, bundle: str) -> list[dict[str, Any]]:
        compiled.append(str(target))
        return [{"held": held, "device": "made up"}]

    def kernels(spec: ModelSpec, config: Resolved, arch: str) -> list[dict[str, Any]]:
        compiled.append(arch)
        return [{"case": "made up", "error": "too large"}]

    monkeypatch.setattr(run, "records", records)
    monkeypatch.setattr(gpu, "examine_gpu", kernels)
    monkeypatch.setattr(target, "version", lambda name: version(name) if name in ("jax", "libtpu") else "made up")
    files = ("--out", str(tmp_path / "r.json"), "--html", str(tmp_path / "p.html"))
    asked = ("--mesh", "tp=8", "--model", str(MODELS / "llama-3.1-70b"))
    assert call(monkeypatch, "compile", "--all-targets", *asked, *files) == 1
    told = {r["target"]: r.get("refused", "") for r in json.loads((tmp_path / "r.json").read_text())["targets"]}
    why = told["tpu:v5e:2x4"]
    assert "3.04 GiB more than" in why
    assert compiled == [t.removeprefix("cuda:").removeprefix("rocm:") for t, refused in told.items() if not refused]
    assert {"sm_90", "gfx942"} <= set(compiled)
    assert {"tpu:v5p:2x2x2", "tpu:v6e:2x4", "tpu:tpu7x:2x2x1"} <= set(compiled)
    assert f"tpu:v5e:2x4: {why}" in capsys.readouterr().out.splitlines()
    assert why in (page := (tmp_path / "p.html").read_text())
    assert "0 of 1 kernels" in page
    assert "too large" in page
    assert call(monkeypatch, "compile", "--all-targets", "--mesh", "tp=3") == 2
    assert not capsys.readouterr().out


@pytest.mark.parametrize("crashes", [1, 2])
def test_a_compiler_that_crashed_is_asked_once_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, crashes: int
) -> None:
    """What it had told is not told again."""
    child = tmp_path / "child"
    child.write_text(
        f"""#!/bin/sh
echo '{{"held": 1}}'; echo '{{"program": "a", "layers": 2}}'
echo x >> {tmp_path}/runs
[ $(wc -l < {tmp_path}/runs) -gt {crashes} ] || kill -SEGV $$
echo '{{"program": "a", "layers": 4}}'; echo '{{"bundle": 1}}'
"""
    )
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    aim = Target.parse("cpu")
    told = []
    lost = pytest.raises(BackendLost, match="ended with -11") if crashes == 2 else nullcontext()
    with lost:
        for record in run.records(run.decide(load(), aim, DEMO), aim):
            told.append(record.get("layers"))
    assert told == [None, 2, 4, None][: 6 - 2 * crashes]
    assert len((tmp_path / "runs").read_text().split()) == 2
