"""What the bodies of requests may hold. Every optional field may be null, which is as if it were left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import msgspec

from engine.errors import InvalidRequest
from engine.serve.reading import convert, kind

Unbuilt: TypeAlias = Mapping[str, tuple[str, tuple[Any, ...]]]
"""Name of a field that would change the answer and is not built -> what to say, and values that ask for nothing."""


class StreamOptions(msgspec.Struct, kw_only=True):
    """include_usage: a last event has the usage. include_obfuscation: OpenAI's padding; there is none here."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampled(msgspec.Struct, kw_only=True):
    """What chat and plain completions share. Beside OpenAI's: SGLang's and vLLM's names of what OpenAI does not have.

    rid: the request's id; X-Request-Id is otherwise. cache_salt: keeps this client's prefix cache apart. timeout:
    seconds from its arrival after which it ends, whatever it has made.
    """

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    min_new_tokens: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: str | list[str] | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    rid: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    timeout: float | None = None


class Chat(Sampled, kw_only=True):
    """POST /v1/chat/completions. messages: each a Message; they are read one by one, so that errors say which."""

    messages: list[Any]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class Completion(Sampled, kw_only=True):
    """POST /v1/completions. prompt: a text, a list of texts, ids, or a list of lists of ids."""

    prompt: str | list[Any]
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None


class Message(msgspec.Struct, kw_only=True):
    """One message of a conversation. content: a text, or a list of Parts."""

    role: str
    content: str | list[Any] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Part(msgspec.Struct, kw_only=True):
    """A piece of a message's content."""

    type: str
    text: str


class Generate(msgspec.Struct, kw_only=True):
    """POST /generate, as SGLang has it. sampling_params: one for all, or a list with one each. logprob_start_len: the
    first token of the prompt that is listed; -1 is none. timeout: as Sampled has it."""

    text: str | list[Any] | None = None
    input_ids: list[Any] | None = None
    sampling_params: dict[str, Any] | list[Any] | None = None
    stream: bool | None = None
    rid: str | None = None
    priority: int | None = None
    model: str | None = None
    cache_salt: str | None = None
    timeout: float | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    return_text_in_logprobs: bool | None = None


class Tokenize(msgspec.Struct, kw_only=True):
    """POST /tokenize. prompt: a text or a list of texts."""

    prompt: str | list[Any]
    add_special_tokens: bool | None = None
    model: str | None = None


class Detokenize(msgspec.Struct, kw_only=True):
    """POST /detokenize. tokens: ids, or a list of lists of them."""

    tokens: list[Any]
    skip_special_tokens: bool | None = None
    model: str | None = None


class Abort(msgspec.Struct, kw_only=True):
    """POST /abort_request: one request, or all."""

    rid: str | None = None
    abort_all: bool | None = None


class Update(msgspec.Struct, kw_only=True):
    """POST /update_weights_from_disk, as SGLang has it. model_path: a folder of the engine's machine."""

    model_path: str
    abort_all_requests: bool | None = None


class Nothing(msgspec.Struct):
    """A route that takes no fields."""


_FORM = "structured output is not built yet"
_TOOLS = "tool calls are not built yet"
_TEXT = "only text is built"
_NOT = "is not built yet"

_COMMON: Unbuilt = {
    "response_format": (f"{_FORM}; only text", ({"type": "text"},)),
    **dict.fromkeys(
        ("json_schema", "regex", "ebnf", "structural_tag", "structured_outputs", "guided_json", "guided_regex",
         "guided_choice", "guided_grammar", "guided_decoding_backend"),
        (_FORM, ()),
    ),
    "stop_regex": (_NOT, ([],)),
    "thinking_token_budget": (_NOT, (0,)),
    **dict.fromkeys(("truncate_prompt_tokens", "session_params", "kv_transfer_params"), (_NOT, ())),
    **dict.fromkeys(("use_beam_search", "return_hidden_states", "return_token_ids", "return_routed_experts"),
                    (_NOT, (False,))),
    **dict.fromkeys(("return_tokens_as_token_ids", "logprob_token_ids"), (_NOT, (False, []))),
    **dict.fromkeys(("lora_path", "lora_id"), ("adapters are not built yet", ())),
    "custom_logit_processor": ("code of a request is never run", ()),
    "custom_params": (_NOT, ({},)),
}  # fmt: skip

CHAT: Unbuilt = {
    **_COMMON,
    "best_of": ("is for /v1/completions", (1,)),
    "tools": (_TOOLS, ([],)),
    "tool_choice": (_TOOLS, ("none",)),
    "functions": (_TOOLS, ([],)),
    "function_call": (_TOOLS, ("none",)),
    "audio": (_TEXT, ()),
    "modalities": (_TEXT, (["text"],)),
    "prediction": (_NOT, ()),
    "web_search_options": ("there is no web search", ()),
    "reasoning_effort": (_NOT, ("none",)),
    "verbosity": (_NOT, ()),
    "chat_template": ("a request may not bring one; the model's own is used", ()),
    "chat_template_kwargs": (_NOT, ({},)),
    "add_generation_prompt": (_NOT, (True,)),
    "continue_final_message": (_NOT, (False,)),
    "documents": (_NOT, ([],)),
    "echo": (_NOT, (False,)),
}
COMPLETION: Unbuilt = {
    **_COMMON,
    "top_logprobs": ("is logprobs here", (0,)),
    "suffix": (_NOT, ("",)),
    "add_special_tokens": (_NOT, (True,)),
}
GENERATE: Unbuilt = {
    **_COMMON,
    "token_ids_logprob": (_NOT, ()),
    **dict.fromkeys(("logprobs", "prompt_logprobs"), ("is return_logprob here, beside sampling_params", ())),
    "input_embeds": (_NOT, ()),
    "image_data": (_TEXT, ([],)),
    "audio_data": (_TEXT, ([],)),
    "video_data": (_TEXT, ([],)),
    "modalities": (_TEXT, (["text"],)),
    "return_bytes": (_NOT, (False,)),
}
NATIVE: Unbuilt = {
    **GENERATE,
    **dict.fromkeys(
        ("logit_bias", "bad_words", "allowed_token_ids", "min_new_tokens", "min_tokens"),
        ("goes into sampling_params", ()),
    ),
}
"""GENERATE and what belongs into sampling_params."""
UPDATE: Unbuilt = {
    "load_format": (_NOT, ("auto",)),
    "weight_version": ("weights are counted here, and the answer says their number", ()),
    "flush_cache": ("what other weights made is never matched", (True,)),
    "is_async": (_NOT, (False,)),
    "keep_pause": (_NOT, (False,)),
    "torch_empty_cache": (_NOT, (False,)),
    "recapture_cuda_graph": (_NOT, (False,)),
    "token_step": (_NOT, (0,)),
    "manifest": (_NOT, ({},)),
}
STREAM_OPTIONS: Unbuilt = {"continuous_usage_stats": (_NOT, (False,))}
MESSAGE: Unbuilt = {
    "tool_calls": (_TOOLS, ([],)),
    "function_call": (_TOOLS, ()),
    "audio": (_TEXT, ()),
    "refusal": (_NOT, ("",)),
    "prefix": (_NOT, (False,)),
}


def messages(form: Chat, unknown: Callable[[str], None]) -> list[dict[str, str]]:
    """The conversation as a template wants it: texts only. Raises InvalidRequest naming the message's field."""
    out = []
    for i, given in enumerate(form.messages):
        where = f"messages[{i}]"
        message = convert(given, Message, where, MESSAGE, unknown)
        entry = {"role": message.role, "content": _content(message, where, unknown)}
        for name in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(message, name)
            if value is not None:
                entry[name] = value
        out.append(entry)
    return out


def _content(message: Message, where: str, unknown: Callable[[str], None]) -> str:
    """Parts are joined to one text: templates differ in what they do with a list, and most take none."""
    content, place = message.content, f"{where}.content"
    if content is None:
        if message.role == "assistant":
            return ""
        raise InvalidRequest(f"{place}: is missing", field=place)
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        name = part.get("type") if isinstance(part, dict) else None
        if isinstance(name, str) and name != "text":
            at = f"{place}[{i}].type"
            raise InvalidRequest(f"{at}: {name[:64]!r} is not built yet; give parts of type 'text'", field=at)
        texts.append(convert(part, Part, f"{place}[{i}]", {}, unknown).text)
    return "".join(texts)


def prompts(given: str | list[Any], name: str) -> tuple[list[str | list[int]], bool]:
    """One or many texts, or one or many lists of ids, and whether it was a list of them. name: of the field.

    Whether ids are in the vocabulary is for the service to say. Raises InvalidRequest naming the place.
    """
    if isinstance(given, str):
        return [given], False
    if not given:
        raise InvalidRequest(f"{name}: is empty", field=name)
    first = type(given[0])
    if first not in (str, int, list):
        raise InvalidRequest(f"{name}[0]: must be a string, an integer or a list, not {kind(given[0])}", field=name)
    for i, item in enumerate(given):
        if type(item) is not first:
            at = f"{name}[{i}]"
            raise InvalidRequest(f"{at}: must be {kind(given[0])}, as {name}[0] is, not {kind(item)}", field=at)
        if first is list:
            for j, token in enumerate(item):
                if type(token) is not int:
                    at = f"{name}[{i}][{j}]"
                    raise InvalidRequest(f"{at}: must be an integer, not {kind(token)}", field=at)
    return ([given], False) if first is int else (given, True)
