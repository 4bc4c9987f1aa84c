"""Logprobs, several answers and biases through the official client, beside Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.serve.harness import NAME, House, folder, house

PROMPT = "over the lazy dog , naïve façade 你好 🙂 or can he"
ASKED: list[Any] = [{"role": "user", "content": PROMPT}]
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
DRAWN = GREEDY | {"temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(folder(tmp_path_factory.mktemp("model")), n=8, page=4, max_tokens=16) as door:
        yield door


@pytest.fixture
def client(door: House) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{door.url}/v1", api_key="x", max_retries=0, timeout=60) as client:
        yield client
    door.settle()


@pytest.fixture(scope="module")
def model(door: House) -> Any:
    return AutoModelForCausalLM.from_pretrained(door.service.info.path, attn_implementation="eager").eval()


def raw(model: Any, ids: Sequence[int]) -> np.ndarray:
    """float64[len(ids), V]: logprobs of what follows each."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([list(ids)])).logits[0].double(), -1).numpy()


def ids_of(door: House, text: str) -> list[int]:
    return door.tokenizer.encode(text)


def chat_ids(door: House) -> list[int]:
    return door.tokenizer.encode(f"user: {PROMPT}\nassistant:", special=False)


def near(found: Any, wanted: Any) -> bool:
    return bool(np.allclose(np.array(found, float), np.array(wanted, float), atol=2e-4))


def made(door: House, prompt: Sequence[int], params: dict[str, Any]) -> list[int]:
    """The ids of an answer, by the native form."""
    given = {"temperature": params["temperature"], "max_new_tokens": params["max_tokens"], "ignore_eos": True}
    if "seed" in params:
        given["seed"] = params["seed"]
    body = {"input_ids": list(prompt), "sampling_params": given}
    return list(httpx.post(f"{door.url}/generate", json=body, timeout=60).json()["output_ids"])


def test_a_chats_logprobs(client: openai.OpenAI, door: House, model: Any) -> None:
    choice = client.chat.completions.create(messages=ASKED, logprobs=True, top_logprobs=3, **DRAWN).choices[0]
    prompt = chat_ids(door)
    ids = made(door, prompt, DRAWN)
    wanted = raw(model, [*prompt, *ids])[len(prompt) - 1 : -1]
    content = choice.logprobs.content
    assert near([c.logprob for c in content], [row[t] for row, t in zip(wanted, ids, strict=True)])
    assert b"".join(bytes(c.bytes) for c in content).decode(errors="replace") == choice.message.content
    for entry, row, token in zip(content, wanted, ids, strict=True):
        text = door.tokenizer.decode([token])
        assert entry.token == text or "\ufffd" in text
        best = np.argsort(-row, kind="stable")[:3]
        assert near([t.logprob for t in entry.top_logprobs], row[best])
        assert [bytes(t.bytes) for t in entry.top_logprobs] == [door.tokenizer.piece(int(b))[1] for b in best]
    bare = client.chat.completions.create(messages=ASKED, logprobs=True, **DRAWN).choices[0]
    assert near([c.logprob for c in bare.logprobs.content], [c.logprob for c in content])
    assert all(c.top_logprobs == [] for c in bare.logprobs.content)
    assert client.chat.completions.create(messages=ASKED, **DRAWN).choices[0].logprobs is None


@pytest.mark.parametrize("n", [1, 3])
def test_a_streamed_chat_tells_the_same(client: openai.OpenAI, n: int) -> None:
    asked = DRAWN | {"messages": ASKED, "logprobs": True, "top_logprobs": 2, "n": n}
    whole = client.chat.completions.create(**asked)
    told: dict[int, list[Any]] = {}
    texts: dict[int, str] = {}
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            told.setdefault(choice.index, []).extend(choice.logprobs.content if choice.logprobs else [])
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    for choice in whole.choices:
        assert [c.to_dict() for c in told[choice.index]] == [c.to_dict() for c in choice.logprobs.content]
        assert texts[choice.index] == choice.message.content


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("k", [0, 2])
def test_a_completions_logprobs(client: openai.OpenAI, door: House, model: Any, echo: bool, k: int) -> None:
    choice = client.completions.create(prompt=PROMPT, logprobs=k, echo=echo, **DRAWN).choices[0]
    prompt = ids_of(door, PROMPT)
    ids = made(door, prompt, DRAWN)
    rows, told = raw(model, [*prompt, *ids]), choice.logprobs
    listed = [*prompt, *ids] if echo else ids
    lists = (told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset)
    assert {len(x) for x in lists} == {len(listed)}
    own, top, start = list(told.token_logprobs), list(told.top_logprobs), len(prompt)
    if echo:
        assert (own.pop(0), top.pop(0)) == (None, None)
        start = 1
    wanted = rows[start - 1 : -1]
    assert near(own, [row[t] for row, t in zip(wanted, [*prompt, *ids][start:], strict=True)])
    for found, row, one in zip(top, wanted, own, strict=True):
        assert one in found.values()
        assert max(found.values()) == pytest.approx(row.max() if k else one, abs=2e-4)
        assert len(found) <= k + 1
    offsets = [*told.text_offset, len(choice.text)]
    pieces = [choice.text[a:b] for a, b in pairwise(offsets)]
    assert "".join(pieces) == choice.text
    for piece, name in zip(pieces, told.tokens, strict=True):
        if name.isascii() and not name.startswith(("bytes:", "<s>")):
            assert piece.startswith(name) or "\ufffd" in piece


@pytest.mark.parametrize("echo", [False, True])
def test_a_streamed_completion_tells_the_same(client: openai.OpenAI, echo: bool) -> None:
    asked = DRAWN | {"prompt": [PROMPT, "a"], "logprobs": 2, "echo": echo, "n": 2}
    whole = client.completions.create(**asked)
    told: dict[int, dict[str, list[Any]]] = {}
    texts: dict[int, str] = {}
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.logprobs:
                for name, more in choice.logprobs.to_dict().items():
                    told.setdefault(choice.index, {}).setdefault(name, []).extend(more)
    assert [told[c.index] for c in whole.choices] == [c.logprobs.to_dict() for c in whole.choices]
    assert [texts[c.index] for c in whole.choices] == [c.text for c in whole.choices]


@pytest.mark.parametrize("most", [0, 1])
def test_a_prompt_is_scored_as_lm_eval_asks(client: openai.OpenAI, door: House, model: Any, most: int) -> None:
    """lm-eval sends ids, echo, logprobs=1 and max_tokens 1, and takes token_logprobs[context:-1]."""
    prompts = [ids_of(door, PROMPT), ids_of(door, "the dog")]
    answer = client.completions.create(
        model=NAME, prompt=prompts, max_tokens=most, echo=True, logprobs=1, temperature=0
    )
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        told, rows = choice.logprobs, raw(model, prompt)
        assert len(told.tokens) == len(prompt) + most
        found = told.token_logprobs[: len(prompt)]
        assert found[0] is None
        assert near(found[1:], [rows[i, t] for i, t in enumerate(prompt[1:])])
        greedy = [p == max(t.values()) for p, t in list(zip(found, told.top_logprobs, strict=False))[1:]]
        assert greedy == [int(rows[i].argmax()) == t for i, t in enumerate(prompt[1:])]
    assert answer.usage.completion_tokens == 2 * most
    assert answer.choices[0].finish_reason == "length"


def test_nothing_but_the_echo_when_no_token_is_made(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt="the dog", max_tokens=0, echo=True).choices[0]
    assert (answer.text, answer.finish_reason, answer.logprobs) == ("the dog", "length", None)
    asked = {"model": NAME, "prompt": "the dog", "max_tokens": 0, "echo": True, "logprobs": 1}
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "the dog"
    whole = client.completions.create(**asked).choices[0].logprobs
    assert chunks[0].choices[0].logprobs.to_dict() == whole.to_dict()


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_vllms_prompt_logprobs(client: openai.OpenAI, door: House, model: Any, form: str) -> None:
    asked = GREEDY | {"extra_body": {"prompt_logprobs": 2}}
    if form == "chat":
        prompt = chat_ids(door)
        told = client.chat.completions.create(messages=ASKED, **asked).to_dict()["prompt_logprobs"]
    else:
        prompt = ids_of(door, PROMPT)
        told = client.completions.create(prompt=PROMPT, **asked).choices[0].to_dict()["prompt_logprobs"]
    rows = raw(model, prompt)
    assert told[0] is None
    assert len(told) == len(prompt)
    for i, (found, token) in enumerate(zip(told[1:], prompt[1:], strict=True)):
        best = np.argsort(-rows[i], kind="stable")[:2].tolist()
        assert set(found) == {str(t) for t in (*best, token)}
        assert near([found[str(t)]["logprob"] for t in (*best, token)], rows[i][[*best, token]])
        assert [found[str(t)]["rank"] for t in best] == [1, 2]


def test_best_of_takes_the_highest_mean_logprob(client: openai.OpenAI) -> None:
    asked = DRAWN | {"prompt": ["the", "a fox"], "max_tokens": 6}
    all_of_them = client.completions.create(**asked, n=5, logprobs=0).choices
    best = client.completions.create(**asked, best_of=5, n=2)
    for i in range(2):
        five = all_of_them[5 * i : 5 * i + 5]
        means = [float(np.mean(c.logprobs.token_logprobs)) for c in five]
        order = sorted(range(5), key=lambda j: -means[j])
        assert order != list(range(5))
        mine = best.choices[2 * i : 2 * i + 2]
        assert [c.text for c in mine] == [five[j].text for j in order[:2]]
        assert [c.index for c in mine] == [2 * i, 2 * i + 1]
        assert all(c.logprobs is None for c in mine)
    assert best.usage.completion_tokens == 60
    told = client.completions.create(**asked, best_of=5, n=2, logprobs=1).choices
    assert [c.text for c in told] == [c.text for c in best.choices]
    assert all(len(c.logprobs.tokens) == 6 for c in told)


def test_a_bias_forces_and_forbids(client: openai.OpenAI, door: House) -> None:
    first = made(door, chat_ids(door), GREEDY)[0]
    never = client.chat.completions.create(messages=ASKED, logit_bias={str(first): -100}, logprobs=True, **GREEDY)
    assert bytes(never.choices[0].logprobs.content[0].bytes) != door.tokenizer.piece(first)[1]
    word = door.tokenizer.encode("dog", special=False)
    always = client.chat.completions.create(
        messages=ASKED, logit_bias={str(word[0]): 100}, logprobs=True, top_logprobs=1, **GREEDY
    )
    content = always.choices[0].logprobs.content
    assert {tuple(c.bytes) for c in content} == {tuple(door.tokenizer.piece(word[0])[1])}
    assert content[0].top_logprobs[0].logprob > content[0].logprob, "logprobs are of the raw logits"


def test_answers_that_are_aborted_tell_what_there_is(client: openai.OpenAI, door: House) -> None:
    asked = GREEDY | {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 100, "stream": True}
    with door.slow(0.02):
        chunks = iter(client.completions.create(**asked))
        next(chunks)
        door.loop.call_soon_threadsafe(door.service.abort, "")
        assert [c.choices[0].finish_reason for c in chunks][-1] == "abort"
