"""SGLang's native forms, beside radixmesh.Engine, which speaks the same names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest

from radixmesh.engine import Engine
from tests.serve.harness import NAME, SMALL, House, folder, house

GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(folder(tmp_path_factory.mktemp("model")), n=4) as door:
        yield door


@pytest.fixture
def client(door: House) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=door.url, timeout=60) as client:
        yield client
    door.settle()


def generate(client: httpx.Client, **body: Any) -> Any:
    answer = client.post("/generate", json={"sampling_params": GREEDY} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    with client.stream("POST", "/generate", json={"sampling_params": GREEDY, "stream": True} | body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def bare(result: dict[str, Any]) -> dict[str, Any]:
    """Without what is drawn, or depends on what was asked before."""
    drop = ("id", "seed", "cached_tokens")
    return result | {"meta_info": {k: v for k, v in result["meta_info"].items() if k not in drop}}


def test_it_is_what_the_engine_in_process_gives(client: httpx.Client, door: House) -> None:
    prompts = ["the dog", "naïve 🙂"]
    config = {k: v for k, v in SMALL.items() if k != "backend"}
    with Engine(door.service.info.path, backend="reference", **config) as engine:
        expected = [bare(r) for r in engine.generate(prompts, sampling_params=GREEDY)]
        seeded = GREEDY | {"temperature": 1.0, "seed": 5}
        drawn = bare(engine.generate(prompts[0], sampling_params=seeded))
    assert [bare(r) for r in generate(client, text=prompts)] == expected
    assert bare(generate(client, text=prompts[0])) == expected[0]
    ids = [door.tokenizer.encode(p) for p in prompts]
    assert [bare(r) for r in generate(client, input_ids=ids)] == expected
    assert bare(generate(client, input_ids=ids[1])) == expected[1]
    assert bare(generate(client, text=prompts[0], sampling_params=seeded)) == drawn
    one_each = [GREEDY | {"max_new_tokens": n} for n in (3, 12)]
    results = generate(client, text=prompts, sampling_params=one_each)
    assert [r["output_ids"] for r in results] == [expected[0]["output_ids"][:3], expected[1]["output_ids"]]


def test_a_stream_gives_all_so_far(client: httpx.Client) -> None:
    whole, steps = generate(client, text="the dog"), events(client, text="the dog")
    for a, b in pairwise(steps):
        assert b["text"].startswith(a["text"])
        assert b["output_ids"][: len(a["output_ids"])] == a["output_ids"]
        assert a["meta_info"]["finish_reason"] is None
    assert bare(steps[-1]) == bare(whole)
    assert len({s["meta_info"]["id"] for s in steps}) == 1
    assert "index" not in steps[0]


def test_a_stream_of_a_list_says_which(client: httpx.Client) -> None:
    whole = generate(client, text=["the dog", "a fox"])
    last = {s["index"]: s for s in events(client, text=["the dog", "a fox"])}
    assert [last[i]["text"] for i in range(2)] == [r["text"] for r in whole]


def test_several_answers_and_their_seeds(client: httpx.Client) -> None:
    params = GREEDY | {"temperature": 1.0, "n": 3}
    results = generate(client, text="the dog", sampling_params=params)
    assert len({r["text"] for r in results}) == 3
    again = generate(client, text="the dog", sampling_params=params | {"n": 1, "seed": results[2]["meta_info"]["seed"]})
    assert again["output_ids"] == results[2]["output_ids"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "text"),
    ({"text": "a", "input_ids": [1]}, "text"),
    ({"text": [1]}, "text"),
    ({"input_ids": ["a"]}, "input_ids"),
    ({"input_ids": []}, "input_ids"),
    ({"input_ids": [[1], []]}, "input_ids[1]"),
    ({"input_ids": [1, 1 << 40]}, "input_ids"),
    ({"text": "a", "return_logprob": "yes"}, "return_logprob"),
    ({"text": "a", "logprob_start_len": 0}, "logprob_start_len"),
    ({"text": "a", "return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
    ({"text": "a", "return_logprob": True, "logprob_start_len": 90}, "logprob_start_len"),
    ({"text": "a", "top_logprobs_num": 1}, "top_logprobs_num"),
    ({"text": "a", "return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num"),
    ({"text": "a", "return_text_in_logprobs": True}, "return_text_in_logprobs"),
    ({"text": "a", "token_ids_logprob": [1]}, "token_ids_logprob"),
    ({"text": "a", "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"text": "a", "logit_bias": {"1": 1}}, "logit_bias"),
    ({"text": "a", "sampling_params": {"logprobs": 1}}, "sampling_params.logprobs"),
    ({"text": "a", "sampling_params": {"return_logprob": True}}, "sampling_params.return_logprob"),
    ({"text": "a", "sampling_params": {"logit_bias": {"x": 1}}}, "sampling_params.logit_bias"),
    ({"text": "a", "sampling_params": {"allowed_token_ids": [9999]}}, "allowed_token_ids"),
    ({"text": "a", "sampling_params": {"min_new_tokens": 300}}, "sampling_params.min_new_tokens"),
    ({"text": "a", "image_data": "x"}, "image_data"),
    ({"text": "a", "lora_path": "x"}, "lora_path"),
    ({"text": "a", "rid": ["x"]}, "rid"),
    ({"text": "a", "rid": "é"}, "rid"),
    ({"text": "a", "sampling_params": 3}, "sampling_params"),
    ({"text": "a", "sampling_params": [{}]}, "sampling_params"),
    ({"text": ["a", "b"], "sampling_params": [{}, 3]}, "sampling_params[1]"),
    ({"text": ["a", "b"], "sampling_params": [{}, {"top_p": 2}]}, "sampling_params[1].top_p"),
    ({"text": "a", "sampling_params": {"n": 5}}, "n"),
    ({"text": "a", "sampling_params": {"n": True}}, "sampling_params.n"),
    ({"text": "a", "sampling_params": {"regex": "a"}}, "sampling_params.regex"),
    ({"text": "a", "sampling_params": {"temprature": 1}}, "sampling_params.temprature"),
    ({"text": "a", "sampling_params": {"max_new_tokens": 1e300}}, "sampling_params.max_new_tokens"),
    ({"text": "a", "sampling_params": {"stop": [3]}}, "sampling_params.stop"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_bad_input_names_its_field(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    answer = client.post("/generate", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_null_and_what_asks_for_nothing(client: httpx.Client) -> None:
    whole = bare(generate(client, text="the dog"))
    quiet = {"input_ids": None, "rid": None, "stream": None, "return_logprob": False, "lora_path": None}
    params = GREEDY | {"stop": None, "regex": None, "n": 1, "min_new_tokens": 0, "spaces_between_special_tokens": True}
    assert bare(generate(client, text="the dog", **quiet, sampling_params=params)) == whole


def test_tokenize_and_back(client: httpx.Client, door: House) -> None:
    def post(path: str, **body: Any) -> Any:
        answer = client.post(path, json=body)
        return answer.json() if answer.status_code == 200 else answer.json()["error"]["param"]

    text, many = "naïve 🙂 the dog", ["the dog", ""]
    ids = door.tokenizer.encode(text)
    assert post("/tokenize", prompt=text) == {"tokens": ids, "count": len(ids), "max_model_len": 192}
    assert post("/tokenize", prompt=text, add_special_tokens=False)["tokens"] == ids[1:]
    lists = [door.tokenizer.encode(t) for t in many]
    assert post("/tokenize", prompt=many) == {"tokens": lists, "count": [len(i) for i in lists], "max_model_len": 192}
    assert post("/detokenize", tokens=ids) == {"text": text}
    assert post("/detokenize", tokens=ids, skip_special_tokens=False) == {"text": "<s>" + text}
    assert post("/detokenize", tokens=lists) == {"text": many}
    assert post("/detokenize", tokens=[]) == {"text": ""}
    assert len(post("/detokenize", tokens=ids * 2000)["text"]) == len(text) * 2000
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": [1]}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [[1], [1 << 70]]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ):
        assert post(path, **body) == param, (path, body)


def test_abort_and_flush(client: httpx.Client, door: House) -> None:
    long = {"max_new_tokens": 150, "ignore_eos": True, "n": 2}
    with door.slow(0.02):
        for asked in ({"rid": "mine"}, {"abort_all": True}):
            body = {"text": "the", "rid": "mine", "stream": True, "sampling_params": long}
            with client.stream("POST", "/generate", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                busy = client.post("/flush_cache")
                assert (busy.status_code, "open" in busy.json()["error"]["message"]) == (400, True)
                assert client.post("/abort_request", json=asked).json() == {"aborted": 2}
                rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            ends = {r["index"]: r["meta_info"]["finish_reason"] for r in rest}
            assert [e["type"] for e in ends.values()] == ["abort", "abort"]
    door.settle()
    assert client.post("/abort_request", json={"rid": "mine"}).json() == {"aborted": 0}
    assert client.post("/abort_request", json={}).json()["error"]["param"] == "rid"
    prompt = list(range(40, 80))
    params = GREEDY | {"max_new_tokens": 1}
    seen = [generate(client, input_ids=prompt, sampling_params=params)["meta_info"]["cached_tokens"] for _ in range(2)]
    assert seen[1] > seen[0]
    door.settle()
    assert client.post("/flush_cache").json() == {"flushed": True}
    assert generate(client, input_ids=prompt, sampling_params=params)["meta_info"]["cached_tokens"] == 0
    assert client.get("/v1/models").json()["data"][0]["id"] == NAME
