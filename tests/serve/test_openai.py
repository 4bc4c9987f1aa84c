"""OpenAI's forms, through the official client and a real port. tests/serve/test_openai2.py runs this file once more,
with the client's version 2."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.errors import RequestFailed
from engine.run.messages import Abort, News
from engine.sched.request import Output
from engine.sched.stop import Finish
from engine.serve.schemas import CHAT, COMPLETION, Chat, Completion
from tests.serve.harness import NAME, House, folder, house

KEY = "sesame"
ASKED: list[Any] = [{"role": "user", "content": "the quick brown"}]
PROMPT = "user: the quick brown\nassistant:"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(folder(tmp_path_factory.mktemp("model")), api_key=KEY, n=8) as door:
        yield door


@pytest.fixture
def client(door: House) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{door.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client
    door.settle()


def greedy(door: House, prompt: str, count: int) -> str:
    """What Hugging Face makes of it."""
    model = AutoModelForCausalLM.from_pretrained(door.service.info.path, attn_implementation="eager").eval()
    ids = door.tokenizer.encode(prompt, special=not prompt.startswith("user"))
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return door.tokenizer.decode(ids[start:])


def chat(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**({"model": NAME, "messages": ASKED} | GREEDY | more))


def complete(client: openai.OpenAI, **more: Any) -> Any:
    return client.completions.create(**({"model": NAME, "prompt": "the quick brown"} | GREEDY | more))


def test_models(client: openai.OpenAI, door: House) -> None:
    assert [m.id for m in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).object == "model"
    assert client.models.retrieve(door.service.info.path).id == NAME
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_greedy_is_hugging_faces(client: openai.OpenAI, door: House) -> None:
    answer = chat(client)
    assert answer.choices[0].message.content == greedy(door, PROMPT, 24)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint == chat(client).system_fingerprint
    plain = complete(client)
    assert plain.choices[0].text == greedy(door, "the quick brown", 24)
    assert (plain.object, plain.model) == ("text_completion", NAME)


def test_usage(client: openai.OpenAI, door: House) -> None:
    prompt = "over the lazy dog , or can he ? it 's what they 've said"
    first, again = complete(client, prompt=prompt).usage, complete(client, prompt=prompt, n=2).usage
    length = len(door.tokenizer.encode(prompt))
    assert (first.prompt_tokens, first.completion_tokens, first.total_tokens) == (length, 24, length + 24)
    assert first.prompt_tokens_details.cached_tokens == 0
    assert 0 < again.prompt_tokens_details.cached_tokens < length
    assert (again.prompt_tokens, again.completion_tokens) == (length, 48)
    both = complete(client, prompt=["the dog", "a fox"]).usage
    assert both.prompt_tokens == sum(len(door.tokenizer.encode(p)) for p in ("the dog", "a fox"))


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_of_chat_is_the_whole(client: openai.OpenAI, n: int) -> None:
    asked = {"temperature": 0.9, "seed": 11, "n": n}
    whole = chat(client, **asked)
    chunks = list(chat(client, **asked, stream=True, stream_options={"include_usage": True}))
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"
    texts, ends, roles = {}, {}, []
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        assert choice.index not in ends
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        roles += [choice.delta.role] if choice.delta.role else []
        if choice.finish_reason is not None:
            ends[choice.index] = choice.finish_reason
    assert roles == ["assistant"] * n
    assert [texts[i] for i in range(n)] == [c.message.content for c in whole.choices]
    assert [ends[i] for i in range(n)] == [c.finish_reason for c in whole.choices]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert not any(c.usage for c in chat(client, **asked, stream=True))


def test_a_stream_of_completions_is_the_whole(client: openai.OpenAI) -> None:
    asked = {"prompt": ["the dog", "naïve 🙂"], "n": 2, "seed": 5, "temperature": 1.0, "echo": True}
    whole = complete(client, **asked)
    texts, ends = {}, {}
    for chunk in complete(client, **asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason is not None:
                ends[choice.index] = choice.finish_reason
    assert [texts[i] for i in range(4)] == [c.text for c in whole.choices]
    assert [ends[i] for i in range(4)] == ["length"] * 4
    assert [t[:3] for t in (whole.choices[0].text, whole.choices[3].text)] == ["the", "naï"]


def test_many_streams_at_once_do_not_mix(door: House) -> None:
    prompts = [f"the {i} dog" for i in range(24)]

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        made = ""
        async for chunk in await client.completions.create(
            model=NAME, prompt=prompt, temperature=0, max_tokens=20, stream=True, extra_body={"ignore_eos": True}
        ):
            made += chunk.choices[0].text
        return made

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key=KEY, timeout=60) as client:
            return await asyncio.gather(*(one(client, p) for p in prompts))

    made = asyncio.run(all_of_them())
    with openai.OpenAI(base_url=f"{door.url}/v1", api_key=KEY) as client:
        whole = complete(client, prompt=prompts, max_tokens=20)
    assert made == [c.text for c in whole.choices]


def test_prompts_of_every_kind(client: openai.OpenAI, door: House) -> None:
    texts = ["the dog", "def f ( x )"]
    ids = [door.tokenizer.encode(t) for t in texts]
    one = [complete(client, prompt=t).choices[0].text for t in texts]
    assert [c.text for c in complete(client, prompt=texts).choices] == one
    assert [c.text for c in complete(client, prompt=ids).choices] == one
    assert complete(client, prompt=ids[0]).choices[0].text == one[0]
    echoed = complete(client, prompt=ids[0], echo=True).choices[0].text
    assert echoed == "the dog" + one[0]


def test_content_in_parts(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "the quick"}, {"type": "text", "text": " brown"}]
    whole = chat(client).choices[0].message.content
    assert chat(client, messages=[{"role": "user", "content": parts}]).choices[0].message.content == whole


@pytest.mark.parametrize("many", [False, True])
def test_stop(client: openai.OpenAI, many: bool) -> None:
    text = chat(client).choices[0].message.content
    stop = text[6:8]
    asked = {"stop": ["not there", stop] if many else stop}
    choice = chat(client, **asked).choices[0]
    assert (choice.message.content, choice.finish_reason) == (text[: text.index(stop)], "stop")
    streamed = "".join(c.choices[0].delta.content or "" for c in chat(client, **asked, stream=True))
    assert streamed == choice.message.content
    kept = chat(client, **asked, extra_body={"ignore_eos": True, "include_stop_str_in_output": True})
    assert stop in kept.choices[0].message.content


def test_stop_ids(client: openai.OpenAI, door: House) -> None:
    ids = door.tokenizer.encode(complete(client).choices[0].text, special=False)
    choice = complete(client, extra_body={"ignore_eos": True, "stop_token_ids": ids}).choices[0]
    assert choice.finish_reason == "stop"


def test_seeds(client: openai.OpenAI) -> None:
    def texts(**more: Any) -> list[str]:
        return [c.text for c in complete(client, **({"temperature": 1.0, "max_tokens": 16} | more)).choices]

    three = texts(seed=7, n=3)
    assert texts(seed=7, n=3) == three
    assert texts(seed=7) == three[:1]
    assert len(set(three)) == 3
    assert texts(seed=8) != texts(seed=7)
    assert texts(seed=-3) == texts(seed=-3)
    assert texts() != texts()


def test_how_many_tokens(client: openai.OpenAI, door: House) -> None:
    assert complete(client, max_tokens=None).usage.completion_tokens == 16
    assert chat(client, max_tokens=None, max_completion_tokens=7).usage.completion_tokens == 7
    left = chat(client, max_tokens=None)
    assert left.usage.total_tokens == door.service.info.room
    assert left.choices[0].finish_reason == "length"


def test_null_is_left_out(client: openai.OpenAI) -> None:
    nothing = dict.fromkeys({*Chat.__struct_fields__, *CHAT} - {"messages", "model", "temperature", "max_tokens"})
    assert chat(client, extra_body=nothing | {"ignore_eos": True}).choices == chat(client).choices
    nothing = dict.fromkeys({*Completion.__struct_fields__, *COMPLETION} - {"prompt", "model", "temperature"})
    given = nothing | {"ignore_eos": True, "max_tokens": 24}
    assert complete(client, extra_body=given).choices == complete(client).choices


def test_harmless_fields_are_taken(client: openai.OpenAI) -> None:
    given = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "n": 1, "logprobs": False,
             "response_format": {"type": "text"}, "tool_choice": "none", "logit_bias": {}, "tools": []}  # fmt: skip
    assert chat(client, **given).choices[0].message.content == chat(client).choices[0].message.content
    salted = [complete(client, extra_body={"cache_salt": s, "ignore_eos": True}) for s in "ab"]
    assert {s.usage.prompt_tokens_details.cached_tokens for s in salted} == {0}


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"top_logprobs": 3}, "top_logprobs"),
    ("chat", {"top_logprobs": 3, "logprobs": False}, "top_logprobs"),
    ("chat", {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ("chat", {"top_logprobs": -1, "logprobs": True}, "top_logprobs"),
    ("chat", {"logprobs": 3}, "logprobs"),
    ("chat", {"logit_bias": {"5": 101}}, "logit_bias"),
    ("chat", {"logit_bias": {"100000": 1}}, "logit_bias"),
    ("chat", {"extra_body": {"min_tokens": 25}}, "min_tokens"),
    ("chat", {"extra_body": {"min_new_tokens": 25}}, "min_new_tokens"),
    ("chat", {"extra_body": {"min_new_tokens": 2, "min_tokens": 3}}, "min_tokens"),
    ("chat", {"extra_body": {"allowed_token_ids": []}}, "allowed_token_ids"),
    ("chat", {"extra_body": {"allowed_token_ids": [1], "min_tokens": 2}}, "min_tokens"),
    ("chat", {"extra_body": {"bad_words": [""]}}, "bad_words"),
    ("chat", {"extra_body": {"prompt_logprobs": 21}}, "prompt_logprobs"),
    ("chat", {"stream": True, "extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs"),
    ("chat", {"extra_body": {"best_of": 3}}, "best_of"),
    ("chat", {"extra_body": {"cache_salt": "x" * 2000}}, "cache_salt"),
    ("chat", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ("chat", {"tool_choice": "auto"}, "tool_choice"),
    ("chat", {"response_format": {"type": "json_object"}}, "response_format"),
    ("chat", {"reasoning_effort": "high"}, "reasoning_effort"),
    ("chat", {"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
    ("chat", {"extra_body": {"regex": "a+"}}, "regex"),
    ("chat", {"temperature": 1e9}, "temperature"),
    ("chat", {"temperature": "hot"}, "temperature"),
    ("chat", {"top_p": 0}, "top_p"),
    ("chat", {"max_tokens": 0}, "max_tokens"),
    ("chat", {"max_tokens": None, "max_completion_tokens": -1}, "max_completion_tokens"),
    ("chat", {"max_completion_tokens": 5}, "max_tokens"),
    ("chat", {"n": 0}, "n"),
    ("chat", {"n": 9}, "n"),
    ("chat", {"n": 1.5}, "n"),
    ("chat", {"seed": 1 << 70}, "seed"),
    ("chat", {"stop": [""]}, "stop"),
    ("chat", {"stop": ["a", 3]}, "stop[1]"),
    ("chat", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("chat", {"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": "hello"}, "messages"),
    ("chat", {"messages": [3]}, "messages[0]"),
    ("chat", {"messages": [{"content": "a"}]}, "messages[0].role"),
    ("chat", {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ("chat", {"messages": [*ASKED, {"role": "user", "content": 5}]}, "messages[1].content"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ("chat", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ("chat", {"extra_body": {"rid": ""}}, "rid"),
    ("complete", {"prompt": []}, "prompt"),
    ("complete", {"prompt": ["a", 3]}, "prompt[1]"),
    ("complete", {"prompt": [[1], ["x"]]}, "prompt[1][0]"),
    ("complete", {"prompt": [1, 100_000]}, "prompt"),
    ("complete", {"prompt": [[1]] * 1200}, "prompt"),
    ("complete", {"suffix": "x"}, "suffix"),
    ("complete", {"best_of": 1, "n": 2}, "best_of"),
    ("complete", {"best_of": 9}, "best_of"),
    ("complete", {"best_of": 2, "stream": True}, "best_of"),
    ("complete", {"best_of": 2, "max_tokens": 0}, "best_of"),
    ("complete", {"logprobs": 21}, "logprobs"),
    ("complete", {"logprobs": 21, "echo": True}, "logprobs"),
    ("complete", {"logprobs": True}, "logprobs"),
    ("complete", {"max_tokens": -1}, "max_tokens"),
    ("complete", {"extra_body": {"top_logprobs": 1}}, "top_logprobs"),
    ("complete", {"extra_body": {"stop_token_ids": [-1]}}, "stop_token_ids"),
]


@pytest.mark.parametrize(("form", "given", "param"), BAD, ids=[f"{b[2]}-{i}" for i, b in enumerate(BAD)])
def test_what_is_not_honoured_is_refused_by_name(
    client: openai.OpenAI, form: str, given: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **given) if form == "chat" else complete(client, **given)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert str(param).partition("[")[0] in caught.value.body["message"]  # type: ignore[index]


def test_a_prompt_past_the_context(client: openai.OpenAI) -> None:
    long = "the quick brown fox " * 200
    for ask in (
        lambda: complete(client, prompt=long),
        lambda: complete(client, prompt=[5] * 192),
        lambda: complete(client, prompt=[5] * 20_000),
        lambda: chat(client, messages=[{"role": "user", "content": long}]),
        lambda: chat(client, messages=[{"role": "user", "content": long}], stream=True),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask()
        assert caught.value.code == "context_length_exceeded"


def test_other_errors(client: openai.OpenAI, door: House) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, model="other")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    for key in ("other", KEY[:-1], KEY + "x"):
        with openai.OpenAI(base_url=f"{door.url}/v1", api_key=key, max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError) as refused:
                chat(stranger)
            assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=NAME, input="a")


def test_an_error_in_a_stream_reaches_the_client(client: openai.OpenAI, door: House) -> None:
    """A request that fails after it began to answer."""
    with door.slow(0.05):
        stream = chat(client, stream=True, max_tokens=100)
        next(stream)
        (rid,) = door.service._calls
        failed = Output(rid=rid, finish=Finish(kind="error"), error=RequestFailed("its logits are not finite"))
        door.loop.call_soon_threadsafe(door.service._deliver, News(outputs=(failed,)))
        with pytest.raises(openai.APIError, match="not finite"):
            list(stream)
    door.client.say(Abort(rid=rid))  # which the loop never failed


def test_what_waits_is_bounded(door: House) -> None:
    with (
        house(Path(door.service.info.path), slots=1, queue=1) as small,
        openai.OpenAI(base_url=f"{small.url}/v1", api_key="any", max_retries=0, timeout=60) as client,
        ThreadPoolExecutor(2) as pool,
        small.slow(0.02),
    ):
        running = complete(client, stream=True, max_tokens=150)
        next(running)
        waiting = pool.submit(complete, client, max_tokens=3)
        small.until(lambda: len(small.client.carrier.loop.scheduler.waiting) == 1, "nothing waits")
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                complete(client, stream=stream)
            assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
            assert int(caught.value.response.headers["retry-after"]) > 0
        running.close()
        assert waiting.result().usage.completion_tokens == 3
        small.settle()
