"""The command line: what it prints, and that what a user can mend ends in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from engine.config import load
from engine.sampling import SamplingParams
from radixmesh import cli
from radixmesh.commands import bench, generate, options, serve
from radixmesh.commands.generate import Ran, differences
from radixmesh.engine import DEMO
from tests.text.made import made
from tests.tiny import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = made("byte_level")
    tiny(path, vocab=len(tokenizer), max_len=128, eos=tokenizer.eos_token_id)
    tokenizer.save_pretrained(path)
    return path


SMALL = ("--set", "slots=2", "--set", "cache.tokens=256", "--set", "max_tokens=16", "--set", "token_buckets=[16]")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """`python -m radixmesh` in a process of its own."""
    command = [sys.executable, "-m", "radixmesh", *args]
    home = Path(cli.__file__).parent.parent
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=home, check=False)


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """`main` in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["radixmesh", *args])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_generate_prints_text_and_speed(folder: Path) -> None:
    done = run("generate", "the dog", "--model", str(folder), "--backend", "reference", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "the dog" in done.stdout
    assert "[reference] 64 tokens in" in done.stdout
    assert "tokens/s" in done.stdout


ALL = (
    "--max-new-tokens=6", "--min-new-tokens=2", "--temperature=0.9", "--top-p=0.9", "--top-k=50", "--min-p=0.01",
    "--seed=4", "--repetition-penalty=1.1", "--presence-penalty=0.1", "--frequency-penalty=0.1", "--stop=zzz",
    "--stop-token-ids=9", "--ignore-eos", "--logit-bias=70=5", "--logit-bias=71=-100",
    *(f"--allowed-token-ids={i}" for i in range(60, 100)),
    "--bad-words=b", "--logprobs=2", "--prompt-logprobs=1", "--logprob-start-len=1", "--special",
    "--no-stop-trim", "-n", "2",
)  # fmt: skip


def test_every_sampling_parameter_has_a_flag(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {f.partition("=")[0][2:].replace("-", "_") for f in ALL if f.startswith("--")}
    names = {"special": "skip_special_tokens"}
    assert {names.get(f, f) for f in flags} == {f.name for f in fields(SamplingParams)}
    model = ("--model", str(folder), "--backend", "reference", *SMALL)
    code, out, err = call(monkeypatch, capsys, "generate", "the dog", "--json", *ALL, *model)
    assert code == 0, err
    first, second = json.loads(out)["runs"][0]["results"]
    for result in (first, second):
        meta = result["meta_info"]
        assert set(result["output_ids"]) <= set(range(60, 100)) - {71}
        assert [i for _, i, _ in meta["output_token_logprobs"]] == result["output_ids"]
        assert {len(top) for top in meta["output_top_logprobs"]} == {2}
        assert [len(top or ()) for top in meta["input_top_logprobs"]][:2] == [0, 1]
    assert first["output_ids"] != second["output_ids"]
    code, out, err = call(monkeypatch, capsys, "generate", "the dog", *ALL, *model)
    assert code == 0, err
    (_, logprob, text), *_ = [(None, *row[:3:2]) for row in first["meta_info"]["output_token_logprobs"]]
    assert f"{logprob:9.4f}  {text!r}" in out
    for bad in ("x", "5", "5=x", "5=101", "-5=1"):
        code, out, err = call(monkeypatch, capsys, "generate", "a", f"--logit-bias={bad}", *model)
        assert (code, err.startswith("radixmesh: logit_bias")) == (2, True), err


def test_both_backends_are_compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--model", str(folder), "--max-new-tokens", "8", "--temperature", "0.8", "--ignore-eos", *SMALL)
    code, out, err = call(monkeypatch, capsys, "generate", "--compare", "a", "def f", "--json", *args)
    assert code == 0, err
    said = json.loads(out)
    assert [r["backend"] for r in said["runs"]] == ["jax", "torch"]
    assert {r["dtype"] for r in said["runs"]} == {"float32"}
    assert said["differences"] == []
    first, second = (r["results"] for r in said["runs"])
    assert [r["output_ids"] for r in first] == [r["output_ids"] for r in second]
    assert all(len(r["output_ids"]) == 8 for r in first)


def test_backends_that_differ_are_a_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ran(backend: str | None, *_: object) -> Ran:
        ids = [[1, 2, 3], [4, 5]] if backend == "jax" else [[1, 2, 3], [4, 9]]
        results = [{"text": "x", "output_ids": i, "meta_info": {"completion_tokens": len(i)}} for i in ids]
        return Ran(backend=str(backend), device="d", dtype="float32", start=1, seconds=1, results=results)

    monkeypatch.setattr(generate, "_run", ran)
    code, out, _ = call(monkeypatch, capsys, "generate", "a", "b", "--compare", "--model", str(folder))
    assert code == 1
    assert "prompt 1 differs at token 1: {'jax': [5], 'torch': [9]}" in out
    assert "agree" not in out
    assert differences([ran("jax"), ran("jax")]) == []


def test_chat_puts_the_prompt_into_the_models_template(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("generate", "hello", "--chat", "--backend", "reference", "--max-new-tokens", "2", "--json")
    code, out, err = call(monkeypatch, capsys, *args)
    assert code == 0, err
    ids = AutoTokenizer.from_pretrained(DEMO).apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_dict=False
    )
    assert json.loads(out)["runs"][0]["results"][0]["meta_info"]["prompt_tokens"] == len(ids)


def test_explain_says_what_and_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("explain", "--model", str(folder), "--backend", "jax", "--set", "cache.page=32", "--set", "cache_tokens=64")
    code, out, _ = call(monkeypatch, capsys, *args)
    assert code == 0
    for part in ("backend.name", "cache.page", "max_len", "what the cache holds", "counts of penalties", "layers 0-1:"):
        assert part in out
    code, out, _ = call(monkeypatch, capsys, *args, "--json")
    said = json.loads(out)
    made_ = {d["field"]: d["value"] for d in said["decisions"]}
    assert (code, made_["page"], made_["pages"], made_["max_len"]) == (0, 32, [2], 64)
    memory = said["memory"]
    assert memory["total"] == sum((memory["weights"], *memory["cache"], memory["counts"]))
    assert memory["counts"] > 0
    _, off, _ = call(monkeypatch, capsys, *args, "--json", "--set", "sched.penalties=false")
    assert json.loads(off)["memory"]["counts"] == 0
    assert said["layers"][0]["layers"] == [0, 1]


def test_deterministic_is_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool(ThreadPoolExecutor):
        def __init__(self, **given: object) -> None:
            super().__init__(1)

    seen: list[bool] = []
    monkeypatch.setattr(generate, "_run", lambda name, config, given, *rest: seen.append(read(given)) or exit(0))
    monkeypatch.setattr(serve, "run", lambda config: seen.append(config.backend.deterministic))
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr("radixmesh.bench.offline.measure_subject", lambda *given: seen.append(read(given[-1])) or [])
    for command in (["generate"], ["serve"], ["bench", "offline", "--subjects", "torch"]):
        for flag in ([], ["--deterministic"]):
            done = CliRunner().invoke(cli.make_app(), [*command, *flag])
            assert done.exit_code == 0, done.output
    assert seen == [False, True] * 3


def read(given: Mapping[str, object]) -> bool:
    return load(None, given).backend.deterministic


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("generate", "--model", "/nowhere"), "/nowhere: does not exist"),
        (("explain", "--set", "cache.paeg=1"), "did you mean cache.page"),
        (("explain", "--set", "cache.page"), "write it as KEY=VALUE"),
        (("explain", "--mesh", "dp=2"), "mesh: dp=2 is not built yet"),
        (("explain", "--config", "/nowhere.toml"), "/nowhere.toml: No such file"),
        (("explain", "--backend", "jaxx"), "did you mean jax"),
        (("generate", "--temperature", "nan", "--backend", "reference"), "temperature: must be a finite number"),
        (("generate", "", "--backend", "reference"), "prompt"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(
    args: tuple[str, ...],
    says: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = () if "--model" in args else ("--model", str(folder))
    code, _, err = call(monkeypatch, capsys, *args, *model)
    assert code == 2
    assert says in err
    lines = err.strip().splitlines()
    assert lines[-1].startswith("radixmesh: ")
    assert "Traceback" not in err


def test_an_architecture_that_is_not_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    code, _, err = call(monkeypatch, capsys, "generate", "--model", str(tmp_path))
    assert code == 2
    assert "MambaForCausalLM" in err
    assert len(err.strip().splitlines()) == 1


def test_usage_errors_and_help() -> None:
    app, runner = cli.make_app(), CliRunner()
    assert runner.invoke(app, ["generate", "--no-such-flag"]).exit_code == 2
    said = runner.invoke(app, ["--help"])
    assert said.exit_code == 0
    assert "generate" in said.output
    assert "explain" in said.output


def test_set_reads_toml_values() -> None:
    pairs = ["a=1", "b=true", "c=[1, 2]", "d=fcfs", "e='x'", "f = 0.5"]
    assert options.read_set(pairs) == {"a": 1, "b": True, "c": [1, 2], "d": "fcfs", "e": "x", "f": 0.5}
