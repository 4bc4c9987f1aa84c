"""radixmesh.Engine: what SGLang's users know, on a random model with a small tokenizer, beside Hugging Face."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import radixmesh
from engine.errors import BackendLost, ConfigError, ContextOverflow, InvalidRequest, ModelError, RadixmeshError
from engine.run.answer import Answer
from engine.run.messages import Abort
from radixmesh.engine import DEMO, Engine
from tests.text.made import made
from tests.tiny import Tiny, tiny

GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
SMALL = {"slots": 4, "max_tokens": 32, "cache_tokens": 1024}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model in a folder, its tokenizer, and an engine on it."""

    model: Tiny
    tokenizer: Any
    engine: Engine

    def expect(self, text: str, count: int) -> list[int]:
        """Hugging Face's greedy tokens after a prompt."""
        return self.model.greedy(self.tokenizer.encode(text), count)


def settle(engine: Engine) -> None:
    """Wait until no request is left in the scheduler."""
    deadline = time.monotonic() + 20
    while engine._client.carrier.loop.busy:
        assert time.monotonic() < deadline, "a request was never ended"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    path = tmp_path_factory.mktemp("model")
    tokenizer = made("byte_level")
    model = tiny(path, vocab=len(tokenizer), max_len=192, eos=tokenizer.eos_token_id)
    tokenizer.save_pretrained(path)
    with Engine(path, backend="reference", **SMALL) as engine:
        yield Case(model=model, tokenizer=tokenizer, engine=engine)


def test_greedy_is_hugging_faces(case: Case) -> None:
    prompt = "the quick brown"
    result = case.engine.generate(prompt, sampling_params=GREEDY)
    ids = case.expect(prompt, 24)
    meta = result["meta_info"]
    assert result["output_ids"] == ids
    assert result["text"] == case.tokenizer.decode(ids, skip_special_tokens=True)
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(case.tokenizer.encode(prompt)), 24)
    assert meta["finish_reason"] == {"type": "length", "length": 24}
    assert meta["id"]
    assert 0 <= meta["seed"] < 2**64


@pytest.mark.parametrize("radix", [True, False])
def test_answers_to_one_prompt_read_it_once(radix: bool, case: Case) -> None:
    ids = case.tokenizer.encode(
        "the quick brown fox jumps over the lazy dog, then the dog jumps over the quick fox " * 2
    )
    asked = {"temperature": 1.0, "max_new_tokens": 6, "seed": 3, "ignore_eos": True, "n": 3}
    scored = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    with Engine(case.model.path, backend="reference", radix=radix, **SMALL) as engine:
        many = engine.generate(token_ids=ids, sampling_params=asked, **scored)
        assert [r["meta_info"]["cached_tokens"] for r in many] == [0, len(ids) - 1, len(ids) - 1]
        for result in many:
            one = asked | {"n": 1, "seed": result["meta_info"]["seed"]}
            alone = engine.generate(token_ids=ids, sampling_params=one, **scored)
            assert alone["output_ids"] == result["output_ids"]
            for name in ("input_token_logprobs", "input_top_logprobs"):
                for a, b in zip(alone["meta_info"][name][1:], result["meta_info"][name][1:], strict=True):
                    assert np.allclose(np.array(a, float), np.array(b, float), atol=1e-4, equal_nan=True)
        assert engine.generate(token_ids=ids, sampling_params=GREEDY)["meta_info"]["cached_tokens"] > 0 or not radix


def test_lists_and_one_set_of_parameters_each(case: Case) -> None:
    prompts = ["the dog", "def f ( x )", "привет"]
    params = [GREEDY | {"max_new_tokens": n} for n in (3, 9, 1)]
    results = case.engine.generate(prompts, sampling_params=params)
    assert [r["output_ids"] for r in results] == [case.expect(p, n) for p, n in zip(prompts, (3, 9, 1), strict=True)]
    ids = [case.tokenizer.encode(p) for p in prompts]
    same = [{k: v for k, v in r.items() if k != "meta_info"} for r in results]
    for given in (ids, [tuple(i) for i in ids], [np.array(i) for i in ids]):
        again = case.engine.generate(token_ids=given, sampling_params=params)
        assert [{k: v for k, v in r.items() if k != "meta_info"} for r in again] == same
    one = case.engine.generate(token_ids=np.array(ids[1]), sampling_params=params[1])
    assert one["output_ids"] == results[1]["output_ids"]


def test_prompts_that_were_seen_are_cached(case: Case) -> None:
    prompt = "over the lazy dog , or can he ? it 's what they 've said"
    first = case.engine.generate(prompt, sampling_params=GREEDY)
    again = case.engine.generate(prompt, sampling_params=GREEDY)
    assert first["meta_info"]["cached_tokens"] == 0
    assert 0 < again["meta_info"]["cached_tokens"] < again["meta_info"]["prompt_tokens"]
    assert again["output_ids"] == first["output_ids"]


def test_a_seed_gives_the_same_again_and_is_returned(case: Case) -> None:
    params = {"temperature": 1.0, "max_new_tokens": 16, "ignore_eos": True}
    drawn = case.engine.generate("the fox", sampling_params=params)
    seed = drawn["meta_info"]["seed"]
    again = case.engine.generate(["a dog", "the fox"], sampling_params=params | {"sampling_seed": seed})
    assert again[1]["output_ids"] == drawn["output_ids"]
    assert again[1]["meta_info"]["seed"] == seed
    assert case.engine.generate("the fox", sampling_params=params)["output_ids"] != drawn["output_ids"]


def test_a_stream_gives_all_so_far_and_ends_as_generate_does(case: Case) -> None:
    whole = case.engine.generate("naïve 🙂", sampling_params=GREEDY)
    steps = list(case.engine.stream("naïve 🙂", sampling_params=GREEDY))
    assert len(steps) > 10
    for a, b in pairwise(steps):
        assert b["text"].startswith(a["text"])
        assert b["output_ids"][: len(a["output_ids"])] == a["output_ids"]
        assert a["meta_info"]["finish_reason"] is None
    assert (steps[-1]["text"], steps[-1]["output_ids"]) == (whole["text"], whole["output_ids"])
    assert steps[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]


@pytest.mark.parametrize("length", [1, 3, 7])
def test_stop_strings(case: Case, length: int) -> None:
    whole = case.engine.generate("def f", sampling_params=GREEDY)
    at = next(i for i in range(8, 40) if "\ufffd" not in whole["text"][i : i + length])
    stop = whole["text"][at : at + length]
    cut = whole["text"].index(stop)
    for params in (GREEDY | {"stop": stop}, GREEDY | {"stop": ["not there", stop]}):
        result = case.engine.generate("def f", sampling_params=params)
        ids = result["output_ids"]
        assert result["text"] == whole["text"][:cut]
        assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        assert ids == whole["output_ids"][: len(ids)]
        assert stop in case.tokenizer.decode(ids)
        assert stop not in case.tokenizer.decode(ids[:-1])
        steps = list(case.engine.stream("def f", sampling_params=params))
        assert steps[-1]["text"] == result["text"]
        assert all(result["text"].startswith(s["text"]) for s in steps)
        kept = case.engine.generate("def f", sampling_params=params | {"no_stop_trim": True})
        assert kept["text"] == case.tokenizer.decode(ids, skip_special_tokens=True)


def test_stop_ids_end_the_answer_and_are_no_part_of_its_text(case: Case) -> None:
    ids = case.expect("def f", 24)
    stop = next(t for i, t in enumerate(ids) if i > 4 and t not in ids[:i])
    end = ids.index(stop)
    result = case.engine.generate("def f", sampling_params=GREEDY | {"stop_token_ids": [stop]})
    assert result["output_ids"] == ids[: end + 1]
    assert result["text"] == case.tokenizer.decode(ids[:end], skip_special_tokens=True)
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    kept = case.engine.generate("def f", sampling_params=GREEDY | {"stop_token_ids": [stop], "no_stop_trim": True})
    assert kept["text"] == case.tokenizer.decode(ids[: end + 1], skip_special_tokens=True)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompts": ""}, "prompts"),
    ({"prompts": ["a", ""]}, "prompts"),
    ({"prompts": []}, "prompts"),
    ({"prompts": 7}, "prompts"),
    ({}, "prompts"),
    ({"prompts": "a", "token_ids": [1]}, "prompts"),
    ({"prompts": "a\ud800"}, "prompt"),
    ({"token_ids": []}, "prompt"),
    ({"token_ids": [[1], []]}, "prompt"),
    ({"token_ids": "abc"}, "token_ids"),
    ({"token_ids": [1, "2"]}, "token_ids"),
    ({"token_ids": [1, 2.0]}, "token_ids"),
    ({"token_ids": [True]}, "token_ids"),
    ({"token_ids": [[1], 2]}, "token_ids"),
    ({"token_ids": [1, 10_000]}, "token_ids"),
    ({"token_ids": [1, -1]}, "token_ids"),
    ({"token_ids": [2**70]}, "token_ids"),
    ({"token_ids": [5] * 192}, "prompt"),
    ({"prompts": "a", "sampling_params": {"temperature": float("nan")}}, "temperature"),
    ({"prompts": "a", "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
    ({"prompts": "a", "sampling_params": {"temprature": 1}}, "temprature"),
    ({"prompts": "a", "sampling_params": {"stop_token_ids": [99_999]}}, "stop_token_ids"),
    ({"prompts": "a", "sampling_params": 3}, "sampling_params"),
    ({"prompts": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
    ({"prompts": "a", "sampling_params": [{}]}, "sampling_params"),
    ({"prompts": ["a", "b"], "sampling_params": [{}, {"top_p": 2}]}, "top_p"),
]


@pytest.mark.parametrize(("asked", "field"), BAD)
def test_bad_input_names_its_field_and_nothing_is_enqueued(case: Case, asked: dict[str, Any], field: str) -> None:
    submitted: list[Any] = []
    say = case.engine._client.say
    try:
        case.engine._client.say = submitted.append  # type: ignore[method-assign]
        with pytest.raises(InvalidRequest) as caught:
            case.engine.generate(**asked)
    finally:
        case.engine._client.say = say  # type: ignore[method-assign]
    assert caught.value.field == field
    assert not submitted
    assert case.engine.generate("the", sampling_params=GREEDY | {"max_new_tokens": 1})["output_ids"]


def test_a_prompt_past_the_context_is_refused_not_cut(case: Case) -> None:
    with pytest.raises(ContextOverflow, match=r"400 tokens.*prompt 1 of the list"):
        case.engine.generate(token_ids=[[1], [5] * 400])
    with pytest.raises(InvalidRequest, match="stream takes one prompt"):
        case.engine.stream(["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest) as caught:
        case.engine.stream("a", sampling_params={"top_k": -5})  # at once, not when it is first read
    assert caught.value.field == "top_k"


def test_an_answer_ends_where_the_context_does(case: Case) -> None:
    result = case.engine.generate(token_ids=[5] * 190, sampling_params=GREEDY)
    assert result["meta_info"]["completion_tokens"] == 2
    assert result["meta_info"]["finish_reason"] == {"type": "length", "length": 2}


def test_a_stream_closed_early_aborts_its_request(case: Case) -> None:
    stream = case.engine.stream("the", sampling_params=GREEDY | {"max_new_tokens": 150})
    next(stream)
    assert case.engine._client.carrier.loop.busy
    stream.close()
    settle(case.engine)
    assert not case.engine._streams._streams


def test_an_interrupt_aborts_every_request_of_the_list(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    take, say = Answer.take, case.engine._client.say
    seen: list[Any] = []
    aborted: set[str] = set()

    def interrupted(self: Answer, output: Any) -> None:
        seen.append(output)
        if len(seen) == 3:
            raise KeyboardInterrupt
        take(self, output)

    def listening(message: Any) -> None:
        if isinstance(message, Abort):
            aborted.add(message.rid)
        say(message)

    monkeypatch.setattr(Answer, "take", interrupted)
    monkeypatch.setattr(case.engine._client, "say", listening)
    with pytest.raises(KeyboardInterrupt):
        case.engine.generate(["the", "a", "dog"], sampling_params=GREEDY | {"max_new_tokens": 150})
    settle(case.engine)
    assert len(aborted) == 3
    assert not case.engine._streams._streams
    monkeypatch.undo()
    assert case.engine.generate("the", sampling_params=GREEDY)["output_ids"] == case.expect("the", 24)


def test_without_a_tokenizer(case: Case) -> None:
    with Engine(case.model.path, backend="reference", skip_tokenizer=True, **SMALL) as engine:
        ids = case.tokenizer.encode("the dog")
        result = engine.generate(token_ids=ids, sampling_params=GREEDY)
        assert "text" not in result
        assert result["output_ids"] == case.expect("the dog", 24)
        assert "text" not in list(engine.stream(token_ids=ids, sampling_params=GREEDY))[-1]
        with pytest.raises(InvalidRequest, match="give token_ids"):
            engine.generate("the dog")
        with pytest.raises(InvalidRequest, match="stop_token_ids"):
            engine.generate(token_ids=ids, sampling_params={"stop": "x"})
        engine.shutdown()
        engine.shutdown()
        with pytest.raises(BackendLost, match="shut down"):
            engine.generate(token_ids=ids)


def test_what_cannot_be_opened_says_why(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        Engine(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="mesh: dp=2 is not built yet"):
        Engine(case.model.path, mesh="dp=2")
    with pytest.raises(ConfigError, match="did you mean"):
        Engine(case.model.path, paeg=3)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((case.model.path / name).read_bytes())
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Engine(tmp_path, backend="reference")
    (tmp_path / "model.safetensors").write_bytes((case.model.path / "model.safetensors").read_bytes()[:-40])
    with pytest.raises(RadixmeshError) as caught:
        Engine(tmp_path, backend="reference", skip_tokenizer=True)
    assert isinstance(caught.value, ModelError)


def test_the_same_file_unchanged_starts_both_backends(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "radixmesh.toml"
    file.write_text(
        f"[model]\npath = {str(case.model.path)!r}\ndtype = 'float32'\nmax_len = 64\n"
        "[cache]\ntokens = 256\npage = 8\n"
        "[sched]\nslots = 2\nmax_tokens = 16\ntoken_buckets = [16]\n"
        "[serve]\n[backend.jax]\nstack = 'list'\n[backend.torch]\n"
    )
    expected = [case.expect(p, 12) for p in ("the fox", "def f ( x )")]
    for backend in ("jax", "torch", "reference"):
        with Engine(file=file, backend=backend) as engine:
            assert engine.status().ready
            assert (engine.resolved.backend, engine.resolved.page, engine.resolved.slots) == (backend, 8, 2)
            results = engine.generate(["the fox", "def f ( x )"], sampling_params=GREEDY | {"max_new_tokens": 12})
            assert [r["output_ids"] for r in results] == expected, backend
            assert engine.status().compiles_after_ready == 0


FOREIGN = ("starlette", "uvicorn", "fastapi", "msgspec", "zmq", "grpc", "llguidance", "xgrammar", "prometheus_client")
"""Server, codec and grammar packages. httpx and pydantic are not here: huggingface_hub may import them by itself."""


def test_in_process_use_imports_no_server_codec_or_grammar_package(case: Case) -> None:
    code = (
        "import sys, radixmesh\n"
        "assert not {'jax', 'torch', 'numpy', 'transformers'} & set(sys.modules), 'import radixmesh is not quick'\n"
        f"with radixmesh.Engine({str(case.model.path)!r}, backend='torch', slots=2, cache_tokens=256) as e:\n"
        "    assert e.generate('the', sampling_params={'max_new_tokens': 2, 'stop': 'x'})['output_ids']\n"
        f"print('foreign:', *[m for m in {FOREIGN!r} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "foreign:\n"


def test_a_foreign_package_of_the_same_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise SystemExit('the foreign engine was run')\n")
    home = str(Path(radixmesh.__file__).parent.parent)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {home!r}]; import radixmesh"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: radixmesh needs its own package 'engine'")
    assert str(tmp_path) in last


def test_the_public_names() -> None:
    assert radixmesh.Engine is Engine
    assert radixmesh.SamplingParams(temperature=0.5).temperature == 0.5
    assert {"Engine", "SamplingParams"} <= set(dir(radixmesh))
    with pytest.raises(AttributeError, match="no attribute 'engin'"):
        _ = radixmesh.engin


def test_without_a_model_the_demo_model_writes() -> None:
    assert (DEMO / "config.json").is_file()
    with Engine(backend="reference", slots=2, cache_tokens=512) as engine:
        result = engine.generate("def ", sampling_params={"temperature": 0, "max_new_tokens": 12})
        assert result["text"].strip()
