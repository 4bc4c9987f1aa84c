"""A bundle: another process starts from it and compiles nothing; one that does not fit, or is none, says so."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from backends.api.conformance.bench import SPEC, config
from backends.jax import bundle
from backends.jax.backend import make_plan
from backends.jax.recipe import first_difference
from backends.jax.step import Plan
from backends.jax.target import examine
from backends.jax.warmup import EDIT, EMPTY, Program, Programs, options
from engine.config import load
from engine.errors import ConfigError
from engine.run.start import decide
from radixmesh import Engine
from tests.plain import ids as ids_of
from tests.plain import plain

SMALL: dict[str, Any] = {
    "backend": "jax",
    "sched.token_buckets": [4, 16],
    "sched.max_tokens": 16,
    "sched.slots": 2,
    "sched.max_rows": 2,
    "cache.tokens": 512,
    "model.max_len": 128,
    "backend.jax.cache": "off",
}
START = """
import json, sys, jax
from radixmesh import Engine
seen = []
jax.monitoring.register_event_duration_secs_listener(lambda name, _, **more: seen.append(name.rpartition("/")[2]))
model, ids, settings = json.loads(sys.argv[1])
with Engine(model, skip_tokenizer=True, **settings) as engine:
    told = {"return_logprob": True, "logprob_start_len": 0}
    greedy = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True, "presence_penalty": 0.5}
    answers = [engine.generate(token_ids=ids, sampling_params=greedy, **more) for more in ({}, told)]
    status = engine.status()
before = list(seen)
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
print(json.dumps({
    "ids": [a["output_ids"] for a in answers], "seen": before, "heard": seen[len(before):],
    "loaded": status.sources.bundle, "made": status.programs, "planned": status.sources.planned,
}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["", pytest.param("tp=2", marks=pytest.mark.slow)])
def made(model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A bundle on one device, made here, and one on a mesh, made by the command, as jax has one device here."""
    folder = tmp_path_factory.mktemp("made") / "bundle"
    if not request.param:
        decided = decide(load(None, SMALL | {"model": str(model)}), model)
        before = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("kept")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()
        try:  # what jax's cache has can't be written once more, so it must not be taken
            for source in ("compiler", "cache"):
                programs = Programs(make_plan(decided.spec, decided.resolved))
                programs.take(EMPTY)
                assert getattr(programs.sources(), source) == 1
            assert Path([*examine(decided.spec, decided.resolved, "", "", str(folder))][-1]["bundle"]) == folder
        finally:
            jax.config.update("jax_compilation_cache_dir", before)
            compilation_cache.reset_cache()
        return folder, request.param
    pairs = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items() if "." in key]
    command = [sys.executable, "-m", "radixmesh", "compile", "--target", "cpu", "--bundle", str(folder)]
    pairs += ["--model", str(model)]
    subprocess.run([*command, "--mesh", request.param, *pairs], check=True, capture_output=True, timeout=200)
    return folder, request.param


def test_another_process_starts_from_it_and_compiles_nothing(model: Path, made: tuple[Path, str]) -> None:
    folder, mesh = made
    ids = ids_of(30)
    settings = SMALL | {"backend.jax.bundle": str(folder)} | ({"mesh": mesh} if mesh else {})
    given = json.dumps([str(model), ids, settings])
    run = subprocess.run([sys.executable, "-c", START, given], capture_output=True, text=True, timeout=200, check=True)
    told = json.loads(run.stdout.splitlines()[-1])
    assert "backend_compile_duration" in told["heard"]
    assert "jaxpr_trace_duration" in told["heard"]
    assert not [name for name in told["seen"] if "compile" in name or "trace" in name]
    assert told["loaded"] == told["made"] == told["planned"] > 5
    with Engine(str(model), skip_tokenizer=True, **SMALL) as engine:
        greedy = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True, "presence_penalty": 0.5}
        want = engine.generate(token_ids=ids, sampling_params=greedy)["output_ids"]
    assert told["ids"] == [want, want]


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A bundle of two programs."""
    given = config("jax", bundle=str(tmp_path_factory.mktemp("little") / "bundle"))
    plan = make_plan(SPEC, given)
    write(plan, Path(given.bundle))
    return Path(given.bundle), given


def write(plan: Plan, folder: Path) -> None:
    made = bundle.Writer(plan, folder)
    for program in (EDIT, Program("choose", 1)):
        lowered = Programs(plan).lower(program)
        made.add(program, lowered, lowered.compile(options(plan, program)))
    made.close()


def find(given: Any) -> Any:
    plan = make_plan(SPEC, given)
    return bundle.find(plan, options(plan))


def test_one_that_does_not_fit_says_in_one_line_where(little: tuple[Path, Any], capfd: pytest.CaptureFixture) -> None:
    folder, given = little
    assert find(given) is not None
    assert find(replace(given, policy="fcfs", radix=False)) is not None  # programs don't know
    assert not capfd.readouterr().err
    assert find(replace(given, slots=7)) is None
    assert capfd.readouterr().err == (
        f"radixmesh: the bundle {folder} does not fit, so programs are compiled: limits.slots is 8 there, 7 here\n"
    )
    assert find(replace(given, pages=(63, 64))) is None
    assert "limits.pages.0 is 64 there, 63 here; set cache.tokens" in capfd.readouterr().err
    manifest = folder / "manifest.json"
    kept = manifest.read_text()
    other = json.loads(kept)
    other["made"]["versions"]["jaxlib"] = "0.0.1"
    other["check"] = bundle._check({k: v for k, v in other.items() if k != "check"})
    manifest.write_text(json.dumps(other))
    assert find(given) is None
    assert 'versions.jaxlib is "0.0.1" there, "' in capfd.readouterr().err
    manifest.write_text(kept)


def test_one_that_is_corrupt_or_none_is_an_error(little: tuple[Path, Any], tmp_path: Path) -> None:
    folder, given = little
    manifest, file = folder / "manifest.json", sorted(folder.glob("*.xla"))
    kept, held = manifest.read_text(), [f.read_bytes() for f in file]
    for text, says in (
        (kept.replace('"size": 1', '"size": 2'), "is corrupt: manifest.json is not what was written"),
        (kept[:-9], "is no bundle: its manifest.json is not JSON"),
        ("{}", "is no bundle: its manifest.json is something else"),
        (kept.replace("bundle 1", "bundle 2"), "is no bundle: it is of another version"),
    ):
        manifest.write_text(text)
        with pytest.raises(ConfigError, match=says):
            find(given)
    manifest.write_text(kept)
    with pytest.raises(ConfigError, match=r"no bundle: manifest\.json: No such file"):
        find(replace(given, bundle=str(tmp_path)))
    file[0].write_bytes(held[0][:-1] + b"!")
    file[1].unlink()
    for program in (EDIT, Program("choose", 1)):
        with pytest.raises(ConfigError, match=r"is corrupt: .*(is not what was written|No such file)"):
            find(given).load(program)
    with pytest.raises(ConfigError, match="is corrupt: it has no copy"):
        find(given).load(Program("copy"))
    for f, before in zip(file, held, strict=True):
        f.write_bytes(before)
    find(given).load(EDIT)


def test_a_folder_with_something_else_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(ConfigError, match="has letter in it and is no bundle"):
        next(examine(SPEC, config("jax"), "", "", str(tmp_path)))
    assert [f.name for f in tmp_path.iterdir()] == ["letter"]


def test_an_engine_does_not_start_from_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no bundle: manifest"):
        Engine(backend="jax", bundle=str(tmp_path))


def test_the_first_difference_is_named() -> None:
    ours = {"versions": {"jax": "1"}, "mesh": {"tp": 2}, "model": {"layers": [{"heads": 2}, {"heads": 4}]}}
    assert first_difference(ours, json.loads(json.dumps(ours))) is None
    theirs = {"versions": {"jax": "1"}, "mesh": {"tp": 2}, "model": {"layers": [{"heads": 2}, {"heads": 8}]}}
    assert first_difference(theirs, ours) == ("model.layers.1.heads", 8, 4)
    assert first_difference({**theirs, "mesh": {}}, ours) == ("mesh.tp", None, 2)
    assert first_difference({**ours, "model": {"layers": []}}, ours) == ("model.layers", [], ours["model"]["layers"])
