"""Every sampling parameter through every face, beside Hugging Face's logits and the normative choice in numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import grpc
import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import engine.serve.grpc as face
from backends.api.choice import Choice, choose
from engine.sampling import SamplingParams
from engine.serve.pb import radixmesh_pb2 as pb
from engine.serve.pb import radixmesh_pb2_grpc as rpc
from radixmesh.engine import Engine
from tests.serve.harness import SMALL, House, folder, house

PROMPT = "the quick brown fox"
COUNT = 16
Params: TypeAlias = dict[str, Any]
Answer: TypeAlias = tuple[str, str]
"""Text and why it ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """One model behind every face."""

    house: House
    engine: Engine
    http: httpx.Client
    stub: Any
    model: Any

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32[len(ids), V]"""
        with torch.no_grad():
            return self.model(torch.tensor([list(ids)])).logits[0].numpy()

    def post(self, path: str, **body: Any) -> Any:
        answer = self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    path = folder(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    with (
        house(path, n=8, max_tokens=16, page=4) as home,
        Engine(path, **SMALL | {"max_tokens": 16, "page": 4}) as engine,
    ):
        server, port = home.run(face.start_grpc(home.service, "127.0.0.1", 0))
        with httpx.Client(base_url=home.url, timeout=60) as http, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Doors(house=home, engine=engine, http=http, stub=rpc.RadixmeshStub(channel), model=model)
            home.settle()
        home.run(server.stop(0))


def oracle(doors: Doors, prompt: Sequence[int], params: Params) -> list[int]:
    """The tokens that a request must get, one whole forward each."""
    p, tokenizer = SamplingParams.of(params), doors.house.tokenizer
    words, made = tokenizer.sequences(p.bad_words), list[int]()
    stops = {*p.stop_token_ids, *(() if p.ignore_eos else doors.house.service.info.eos)}
    vocab = doors.house.service.info.limits.vocab
    bias, counts = np.zeros(vocab, np.float32), np.zeros(vocab, np.int32)
    for token, value in p.logit_bias:
        bias[token] = value
    seen = np.zeros(vocab, bool)
    seen[list(prompt)] = True
    while len(made) < p.max_new_tokens:
        allowed = np.array(
            [
                (p.allowed_token_ids is None or v in p.allowed_token_ids)
                and not (v in stops and len(made) < p.min_new_tokens)
                and not any((*made, v)[-len(w) :] == w for w in words)
                for v in range(vocab)
            ]
        )
        choice = Choice(
            temperature=p.temperature,
            top_k=max(0, p.top_k),
            top_p=p.top_p,
            min_p=p.min_p,
            seed=p.seed or 0,
            penalty=(p.repetition_penalty, p.presence_penalty, p.frequency_penalty),
            seen=seen,
            made=counts,
            bias=bias,
            allowed=allowed,
        )
        ids = [*prompt, *made]
        made.append(choose(doors.logits(ids)[-1], choice, len(ids)))
        seen[made[-1]] = True
        counts[made[-1]] += 1
        text = tokenizer.decode(made[p.min_new_tokens :], skip_special_tokens=p.skip_special_tokens)
        if made[-1] in stops or any(s in text for s in p.stop):
            break
    return made


GREEDY: Params = {"temperature": 0.0, "max_new_tokens": COUNT, "ignore_eos": True}
DRAWN: Params = GREEDY | {"temperature": 1.2, "seed": 11}


def asked(doors: Doors, prompt: Sequence[int]) -> dict[str, Params]:
    """For each parameter a request that gets another answer with it than without."""
    plain = oracle(doors, prompt, GREEDY)
    first, text = plain[0], doors.house.tokenizer.decode(plain)
    eos = doors.house.service.info.eos[0]
    few = DRAWN | {"allowed_token_ids": sorted(set(plain[:4]))}  # it must say them again
    said, whole = words(doors, prompt)
    return {
        "temperature": GREEDY | {"temperature": 1.5, "seed": 3},
        "seed": DRAWN | {"seed": 2**63 + 5},
        "top_k": DRAWN | {"top_k": 2},
        "top_p": DRAWN | {"top_p": 0.3},
        "min_p": DRAWN | {"min_p": 0.4},
        "repetition_penalty": DRAWN | {"repetition_penalty": 0.3},
        "presence_penalty": DRAWN | {"presence_penalty": -2},
        "frequency_penalty": few | {"frequency_penalty": 1.9},
        "logit_bias": GREEDY | {"logit_bias": {str(first): -100, str(plain[3]): 2.5}},
        "max_new_tokens": GREEDY | {"max_new_tokens": 3},
        "min_new_tokens": GREEDY | {"min_new_tokens": 4, "stop_token_ids": [first, plain[1]], "ignore_eos": False},
        "stop": GREEDY | {"stop": [text[5:7]]},
        "stop_token_ids": GREEDY | {"stop_token_ids": [plain[4]]},
        "ignore_eos": GREEDY | {"logit_bias": {str(eos): 100}},
        "skip_special_tokens": GREEDY | {"skip_special_tokens": False, "logit_bias": {str(eos): 100}},
        "no_stop_trim": GREEDY | {"no_stop_trim": True, "stop": [text[5:7]]},
        "allowed_token_ids": GREEDY | {"allowed_token_ids": list(range(60, 90))},
        "bad_words": whole | {"bad_words": said},
    }


def words(doors: Doors, prompt: Sequence[int]) -> tuple[list[str], Params]:
    """A word of one token and one of two that a request makes."""
    tokenizer = doors.house.tokenizer
    vocab = doors.house.service.info.limits.vocab
    own = [t for t in range(3, vocab) if tokenizer.encode(tokenizer.decode([t]), special=False) == [t]]
    whole = GREEDY | {"allowed_token_ids": own, "max_new_tokens": 40}
    made = oracle(doors, prompt, whole)
    pairs = [tokenizer.decode(made[i : i + 2]) for i in range(1, 39)]
    two = [p for i, p in enumerate(pairs) if tokenizer.encode(p, special=False) == made[i + 1 : i + 3]]
    return [tokenizer.decode(made[-1:]), two[0]], whole


SCORED = {"logprobs", "prompt_logprobs", "logprob_start_len"}
"""They change no text, and have tests of their own."""


def test_no_parameter_is_forgotten(doors: Doors) -> None:
    assert set(asked(doors, [5, 6])) | SCORED == {f.name for f in fields(SamplingParams)}


def renamed(params: Params) -> Params:
    names = {
        "max_new_tokens": "max_tokens",
        "min_new_tokens": "min_tokens",
        "no_stop_trim": "include_stop_str_in_output",
    }
    return {names.get(k, k): v for k, v in params.items()}


def by_completion(doors: Doors, prompt: list[int], params: Params) -> Answer:
    (choice,) = doors.post("/v1/completions", prompt=prompt, **renamed(params))["choices"]
    return choice["text"], choice["finish_reason"]


def by_chat(doors: Doors, prompt: list[int], params: Params) -> Answer:
    (choice,) = doors.post("/v1/chat/completions", messages=CHAT, **renamed(params))["choices"]
    return choice["message"]["content"], choice["finish_reason"]


def by_native(doors: Doors, prompt: list[int], params: Params) -> Answer:
    answer = doors.post("/generate", input_ids=prompt, sampling_params=params)
    return answer["text"], answer["meta_info"]["finish_reason"]["type"]


def by_grpc(doors: Doors, prompt: list[int], params: Params) -> Answer:
    bias = {int(token): value for token, value in params.get("logit_bias", {}).items()}
    given = params | {"logit_bias": bias}
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=pb.SamplingParams(**given))
    pieces = [p for chunk in doors.stub.Generate(request, timeout=30) for p in chunk.pieces]
    return "".join(p.text for p in pieces), pieces[-1].finish.reason


CHAT = [{"role": "user", "content": PROMPT}]
FACES: dict[str, Callable[[Doors, list[int], Params], Answer]] = {
    "completion": by_completion, "chat": by_chat, "native": by_native, "grpc": by_grpc,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted({f.name for f in fields(SamplingParams)} - SCORED))
def test_every_face_honours(doors: Doors, name: str) -> None:
    tokenizer = doors.house.tokenizer
    chat = tokenizer.encode(f"user: {PROMPT}\nassistant:", special=False)
    for prompt, faces in ((tokenizer.encode(PROMPT), ("completion", "native", "grpc")), (chat, ("chat",))):
        params = asked(doors, prompt)[name]
        ids = oracle(doors, prompt, params)
        result = doors.engine.generate(token_ids=prompt, sampling_params=params)
        assert result["output_ids"] == ids
        without = {k: v for k, v in params.items() if k != name}
        other = doors.engine.generate(token_ids=prompt, sampling_params={"max_new_tokens": COUNT} | without)
        assert (other["text"], other["output_ids"]) != (result["text"], result["output_ids"])
        expected = result["text"], result["meta_info"]["finish_reason"]["type"]
        for door in faces:
            assert FACES[door](doors, prompt, params) == expected, door


def logprobs(doors: Doors, ids: Sequence[int]) -> np.ndarray:
    """float64[len(ids), V]: of what follows each."""
    x = doors.logits(ids).astype(np.float64)
    return x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))


def close(found: Sequence[float | None], wanted: Sequence[float]) -> bool:
    return len(found) == len(wanted) and np.allclose(np.array(found, float), wanted, atol=2e-4)


LONG = "over the lazy dog , or can he ? it 's what they 've said . naïve façade 你好 🙂 " * 3


@pytest.mark.parametrize("start", [-1, 0, 1, 7, 60])
def test_sglangs_logprobs_are_hugging_faces(doors: Doors, start: int) -> None:
    """Over several chunks, and although the prompt is in the prefix cache by the second time."""
    prompt = doors.house.tokenizer.encode(LONG)
    assert len(prompt) > 70
    params = GREEDY | {"temperature": 1.0, "seed": 4, "logit_bias": {"70": 5}, "max_new_tokens": 5}
    for top in (0, 3):
        score = {"return_logprob": True, "logprob_start_len": start, "top_logprobs_num": top}
        answer = doors.post(
            "/generate", input_ids=prompt, sampling_params=params, **score, return_text_in_logprobs=True
        )
        meta, made = answer["meta_info"], answer["output_ids"]
        raw = logprobs(doors, [*prompt, *made])
        out = meta["output_token_logprobs"]
        assert [i for _, i, _ in out] == made
        assert close([p for p, _, _ in out], [raw[len(prompt) - 1 + i, t] for i, t in enumerate(made)])
        listed = prompt[start:] if start >= 0 else []
        given = meta["input_token_logprobs"]
        assert [i for _, i, _ in given] == listed
        assert all(p is None for p, _, _ in given[:1])
        assert close([p for p, _, _ in given[1:]], [raw[start + i, t] for i, t in enumerate(listed[1:])])
        assert "".join(text for _, _, text in out if "\ufffd" not in text) in answer["text"] or "\ufffd" in str(out)
        if top:
            best = np.argsort(-raw, axis=1, kind="stable")[:, :top]
            for i, row in enumerate(meta["output_top_logprobs"]):
                assert [t for _, t, _ in row] == best[len(prompt) - 1 + i].tolist()
            tops = meta["input_top_logprobs"]
            assert [None if r is None else [t for _, t, _ in r] for r in tops[1:]] == (
                best[start : start + len(listed) - 1].tolist() if listed else []
            )
        else:
            assert "output_top_logprobs" not in meta
        engine = doors.engine.generate(token_ids=prompt, sampling_params=params, **score)
        plain = [(p, i) for p, i, _ in engine["meta_info"]["output_token_logprobs"]]
        assert plain == [(p, i) for p, i, _ in map(tuple, out)]
        again = doors.engine.generate(token_ids=prompt, sampling_params=params, **score)["meta_info"]
        assert again["input_token_logprobs"] == engine["meta_info"]["input_token_logprobs"]
        cached = again["cached_tokens"]
        assert cached <= max(start, 0) if start >= 0 else cached > 60
        assert cached >= start - 4


def test_scoring_makes_no_token(doors: Doors) -> None:
    prompt = doors.house.tokenizer.encode(LONG)
    result = doors.engine.generate(
        token_ids=prompt, sampling_params={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=0
    )
    raw = logprobs(doors, prompt)
    assert result["output_ids"] == []
    assert result["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    found = [p for p, _, _ in result["meta_info"]["input_token_logprobs"]]
    assert close(found[1:], [raw[i, t] for i, t in enumerate(prompt[1:])])
    (last,) = list(doors.engine.stream(token_ids=prompt, sampling_params={"max_new_tokens": 0}))
    assert last["meta_info"]["finish_reason"]["type"] == "length"
    assert last["meta_info"]["cached_tokens"] > 0


def test_grpc_tells_logprobs(doors: Doors) -> None:
    prompt = doors.house.tokenizer.encode(PROMPT)
    sampling = pb.SamplingParams(
        **GREEDY | {"logprobs": 2, "prompt_logprobs": 1, "logprob_start_len": 2, "max_new_tokens": 4}
    )
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, n=2)
    pieces = [p for chunk in doors.stub.Generate(request, timeout=30) for p in chunk.pieces]
    for index in range(2):
        mine = [p for p in pieces if p.index == index]
        made = [t for p in mine for t in p.token_ids]
        raw = logprobs(doors, [*prompt, *made])
        scores = [s for p in mine for s in p.logprobs]
        assert [s.token_id for s in scores] == made
        assert close([s.logprob for s in scores], [raw[len(prompt) - 1 + i, t] for i, t in enumerate(made)])
        assert [s.top[0].token_id for s in scores] == made  # it is greedy
        assert all(len(s.top) == 2 for s in scores)
        told = [s for p in mine for s in p.prompt_logprobs]
        assert [s.token_id for s in told] == prompt[2:]
        assert [s.HasField("logprob") for s in told] == [False, *[True] * (len(prompt) - 3)]
        assert close([s.logprob for s in told[1:]], [raw[2 + i, t] for i, t in enumerate(prompt[3:])])


def test_a_salt_keeps_caches_apart(doors: Doors) -> None:
    prompt = list(range(40, 80))
    params = GREEDY | {"max_new_tokens": 1}

    def cached(salt: str) -> list[int]:
        native = doors.post("/generate", input_ids=prompt, sampling_params=params, cache_salt=salt)
        plain = doors.post("/v1/completions", prompt=prompt, max_tokens=1, cache_salt=salt)
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt), sampling=pb.SamplingParams(max_new_tokens=1), cache_salt=salt
        )
        *_, last = doors.stub.Generate(request, timeout=30)
        local = doors.engine.generate(token_ids=prompt, sampling_params=params, cache_salt=salt)
        return [native["meta_info"]["cached_tokens"], plain["usage"]["prompt_tokens_details"]["cached_tokens"],
                last.usage.cached_tokens, local["meta_info"]["cached_tokens"]]  # fmt: skip

    for salt in ("one", "two"):
        first = cached(salt)
        assert (first[0], first[3]) == (0, 0)
        assert min(first[1], first[2]) > 30
    assert min(cached("one")) > 30


def test_answers_side_by_side(doors: Doors) -> None:
    prompt = doors.house.tokenizer.encode(PROMPT)
    params = DRAWN | {"n": 3}
    three = doors.engine.generate(token_ids=[prompt, prompt[:2]], sampling_params=[params, DRAWN])
    native = doors.post("/generate", input_ids=prompt, sampling_params=params)
    assert [r["output_ids"] for r in three[:3]] == [r["output_ids"] for r in native]
    assert three[0]["output_ids"] == oracle(doors, prompt, DRAWN)
    assert len({tuple(r["output_ids"]) for r in three[:3]}) == 3
    assert len(three) == 4


@pytest.mark.parametrize(
    ("given", "field"),
    [({"sampling_params": {"n": 0}}, "n"), ({"sampling_params": {"n": 1.0}}, "n"),
     ({"sampling_params": {"bad_words": [" "], "logprobs": 21}}, "logprobs"),
     ({"top_logprobs_num": 2}, "top_logprobs_num"),
     ({"return_logprob": True, "logprob_start_len": 99}, "logprob_start_len")],
)  # fmt: skip
def test_the_engine_refuses_by_name(doors: Doors, given: Params, field: str) -> None:
    with pytest.raises(Exception, match=field) as caught:
        doors.engine.generate("the dog", **given)
    assert caught.value.field == field
    with pytest.raises(Exception, match="n: stream gives one answer"):
        doors.engine.stream("the dog", sampling_params={"n": 2})
