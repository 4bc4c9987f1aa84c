"""Requests that mean ill or mean well and are wrong, as bytes for a socket, and what must come back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

CHAT, COMPLETE, GENERATE, TOKENIZE, DETOKENIZE = (
    "/v1/chat/completions", "/v1/completions", "/generate", "/tokenize", "/detokenize",
)  # fmt: skip

Act: TypeAlias = bytes | float | Literal["half", "close", "reset", "read"]
"""Send bytes, wait for seconds, close the sending side, close, close with a reset, or read one piece of what came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """acts: done in order; then all that comes is read. statuses: of the first answer. field: that its JSON error names
    (or one below it); None: none is asked for. closes: it may also just close. answers: how many there must be."""

    name: str
    acts: tuple[Act, ...]
    statuses: frozenset[int]
    field: str | None = None
    closes: bool = False
    answers: int = 1


def head(path: str, length: int | str | None, method: str = "POST", *more: str) -> bytes:
    """The lines before a body."""
    lines = [f"{method} {path} HTTP/1.1", "host: x", "connection: close", *more]
    if length is not None:
        lines.append(f"content-length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def post(path: str, body: bytes, *more: str) -> bytes:
    """A well-formed request."""
    return head(path, len(body), "POST", "content-type: application/json", *more) + body


def case(name: str, path: str, body: Any, field: str | None, *statuses: int) -> Case:
    """A body, bytes or to be JSON, that must be refused."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Case(name=name, acts=(post(path, data),), statuses=frozenset(statuses or (400,)), field=field)


def plain(**more: Any) -> dict[str, Any]:
    return {"prompt": "a", "max_tokens": 4} | more


def said(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4} | more


NAN, INF = float("nan"), float("inf")

SAMPLED: Mapping[str, Sequence[Any]] = {
    "temperature": ("hot", [1], {}, True, -1, 1e999, NAN, 101),
    "top_p": ("x", 0, -0.5, 1.5, NAN, False),
    "top_k": ("x", 1.5, -2, 1 << 70),
    "min_p": ("x", -1, 2, INF),
    "n": ("x", 0, -1, 1.5, 10**9, 1 << 70, True),
    "seed": ("x", 1.5, -(1 << 64), 1 << 64, True),
    "max_tokens": ("x", -1, 1.5, 1 << 70, -(10**30), []),
    "stop": (1, [1], [""], {}, ["x"] * 100_000, "x" * 5000, [None]),
    "stop_token_ids": ("x", [1.5], [-1], [1 << 70], [True], [99999], [0] * 1000),
    "presence_penalty": ("x", 3, NAN),
    "frequency_penalty": ("x", -3, INF),
    "repetition_penalty": ("x", 0, -INF),
    "priority": ("x", 1.5, True, 1 << 31, -(1 << 70), 10**40),
    "ignore_eos": ("x", 1),
    "stream": ("yes", 1),
    "stream_options": (1, "x"),
    "logit_bias": (
        {"999999": 1},
        {"x": 1},
        [1],
        {"5": 101},
        {"5": "1"},
        {"5": None},
        {"-1": 1},
        {"05": 1},
        {"": 1},
        {"9" * 5000: 1},
        {str(i): 1 for i in range(2000)},
        {"\u0665": 1},
        5,
        "x",
    ),
    "allowed_token_ids": ([], [-1], [999_999], [1 << 70], [1.5], ["1"], [True], {}, "x", [[1]]),
    "bad_words": (5, [1], [""], "", ["x"] * 1000, "x" * 5000, [None], {}, [[]]),
    "min_tokens": ("x", -1, 1.5, 1 << 70, True, 5),
    "min_new_tokens": ("x", -1, 1.5, 1 << 70, True, 5),
    "prompt_logprobs": ("x", -1, 21, 1.5, 1 << 70, True),
    "cache_salt": (5, ["x"], "x" * 5000),
    "logprobs": ("x", 1.5, -1, 1e999, [], NAN),
    "top_logprobs": ("x", 1, 1.5, -1, 21, True),
    "model": (1, "no-such-model", {}),
}
"""Field -> values that no route may take."""


def fields() -> Iterator[Case]:
    """Every wrong value, at both of OpenAI's routes."""
    for i, (field, values) in enumerate(SAMPLED.items()):
        for j, value in enumerate(values):
            path, body = ((CHAT, said), (COMPLETE, plain))[(i + j) % 2]
            text = repr(value)[:20]
            yield case(
                f"{field}={text} {path}", path, body(**{field: value}), field, 400, 404 if field == "model" else 400
            )


def deep(levels: int, kind: bytes = b"[]") -> bytes:
    return kind[:1] * levels + kind[1:] * levels


BODIES: tuple[Case, ...] = (
    case("no body", COMPLETE, b"", "body"),
    case("not JSON", COMPLETE, b"hello", "body"),
    case("half of JSON", COMPLETE, b'{"prompt": "a"', "body"),
    case("two JSONs", COMPLETE, b'{"prompt": "a"}{"prompt": "b"}', "body"),
    case("a list", COMPLETE, [1, 2], "body"),
    case("null", COMPLETE, b"null", "body"),
    case("a number", CHAT, b"1", "body"),
    case("a string", CHAT, b'"x"', "body"),
    case("NaN alone", CHAT, b"NaN", "body"),
    case("bare infinity", COMPLETE, b'{"prompt": "a", "temperature": Infinity}', None),
    case("NaN in a logit bias", CHAT, said(logit_bias={"1": NAN}), None),
    case("a number too long with an exponent", COMPLETE, b'{"temperature": ' + b"9" * 200_000 + b"e}", None),
    case("a number too large", COMPLETE, b'{"prompt": "a", "temperature": 1e400}', None),
    case("a number too long", COMPLETE, b'{"prompt": "a", "max_tokens": ' + b"9" * 100_000 + b"}", None),
    case("deep lists", COMPLETE, deep(100_000), "body"),
    case("deep lists as prompt", COMPLETE, b'{"prompt": ' + deep(50_000) + b"}", None),
    case("deep objects unknown", COMPLETE, b'{"x": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"}", None),
    case("invalid UTF-8", COMPLETE, b'{"prompt": "\xff\xfe"}', None),
    case("overlong UTF-8", COMPLETE, b'{"prompt": "\xc0\xaf"}', None),
    case("UTF-16", COMPLETE, json.dumps(plain()).encode("utf-16"), "body"),
    case("a byte order mark", COMPLETE, b"\xef\xbb\xbf" + json.dumps(plain()).encode(), "body"),
    case("a lone surrogate", COMPLETE, b'{"prompt": "a \\ud800 b"}', None),
    case("a lone surrogate in a message", CHAT, b'{"messages": [{"role": "user", "content": "\\udfff"}]}', None),
    case("a lone surrogate as stop", COMPLETE, b'{"prompt": "a", "stop": "\\ud83d"}', None),
    case("null bytes around", COMPLETE, b"\0" + json.dumps(plain()).encode() + b"\0", "body"),
    case("gzip without saying", COMPLETE, b"\x1f\x8b\x08\x00" + bytes(100), "body"),
    case("control characters", COMPLETE, b'{"prompt": "a\x01\x1b"}', "body"),
    case("no prompt", COMPLETE, {"max_tokens": 4}, "prompt"),
    case("prompt null", COMPLETE, plain(prompt=None), "prompt"),
    case("prompt a number", COMPLETE, plain(prompt=5), "prompt"),
    case("prompt an object", COMPLETE, plain(prompt={}), "prompt"),
    case("prompt true", COMPLETE, plain(prompt=True), "prompt"),
    case("no prompts", COMPLETE, plain(prompt=[]), "prompt"),
    case("ids and texts", COMPLETE, plain(prompt=["a", 1]), "prompt"),
    case("ids as floats", COMPLETE, plain(prompt=[1.0, 2.5]), "prompt"),
    case("ids as booleans", COMPLETE, plain(prompt=[True, False]), "prompt"),
    case("ids as strings of one list", COMPLETE, plain(prompt=[[1, "2"]]), "prompt"),
    case("negative ids", COMPLETE, plain(prompt=[-1, 3]), "prompt"),
    case("unknown ids", COMPLETE, plain(prompt=[1, 10**6]), "prompt"),
    case("ids past 64 bits", COMPLETE, plain(prompt=[1 << 80]), "prompt"),
    case("an empty list among lists", COMPLETE, plain(prompt=[[1], []]), "prompt"),
    case("lists too deep", COMPLETE, plain(prompt=[[[1]]]), "prompt"),
    case("past the context", COMPLETE, plain(prompt=[1] * 5000), "prompt"),
    case("past the context, one of a list", COMPLETE, plain(prompt=[[1], [1] * 5000]), "prompt"),
    case("a text past the context", COMPLETE, plain(prompt="x y " * 50_000), "prompt"),
    case("1 MB without a space", COMPLETE, plain(prompt="a" * (1 << 20)), "prompt"),
    case("a million ids", COMPLETE, plain(prompt=[1] * 1_000_000), "prompt"),
    case("10 MB of prompt", COMPLETE, plain(prompt="x" * (10 << 20)), "body", 413),
    case("10 MB of spaces", COMPLETE, b" " * (10 << 20), "body", 413),
    case("100,000 prompts", COMPLETE, plain(prompt=["a"] * 100_000), None, 400, 413, 503),
    case("no messages", CHAT, {"max_tokens": 4}, "messages"),
    case("messages empty", CHAT, said(messages=[]), "messages"),
    case("messages a string", CHAT, said(messages="hello"), "messages"),
    case("messages an object", CHAT, said(messages={"role": "user"}), "messages"),
    case("a message a string", CHAT, said(messages=["hello"]), "messages"),
    case("a message null", CHAT, said(messages=[None]), "messages"),
    case("a message without a role", CHAT, said(messages=[{"content": "a"}]), "messages"),
    case("a role that is a number", CHAT, said(messages=[{"role": 1, "content": "a"}]), "messages"),
    case("content a number", CHAT, said(messages=[{"role": "user", "content": 1}]), "messages"),
    case("content of parts of nothing", CHAT, said(messages=[{"role": "user", "content": [1]}]), "messages"),
    case("an image", CHAT, said(messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}]), "messages"),
    case("100,000 messages", CHAT, said(messages=[{"role": "user", "content": "a"}] * 100_000), "messages"),
    case("a template of one's own", CHAT, said(chat_template="{{ 7 * 7 }}"), "chat_template"),
    case("tools that are numbers", CHAT, said(tools=[1]), "tools"),
    case("response_format unknown", CHAT, said(response_format={"type": "xml"}), "response_format"),
    case("best_of below n", COMPLETE, plain(best_of=1, n=2), "best_of"),
    case("best_of huge", COMPLETE, plain(best_of=1 << 40), "best_of"),
    case("best_of streamed", COMPLETE, plain(best_of=3, stream=True), "best_of"),
    case("best_of of nothing", COMPLETE, plain(best_of=3, max_tokens=0), "best_of"),
    case("best_of negative", COMPLETE, plain(best_of=-1), "best_of"),
    case("a chat of no tokens", CHAT, said(max_tokens=0), "max_tokens"),
    case("top_logprobs alone", CHAT, said(top_logprobs=2), "top_logprobs"),
    case("logprobs as a number in a chat", CHAT, said(logprobs=5), "logprobs"),
    case("logprobs as a flag in a completion", COMPLETE, plain(logprobs=True), "logprobs"),
    case("too many logprobs", COMPLETE, plain(logprobs=1 << 40), "logprobs"),
    case("logprobs of the prompt, streamed", COMPLETE, plain(prompt_logprobs=1, stream=True), "prompt_logprobs"),
    case("nothing may be made", COMPLETE, plain(allowed_token_ids=[5], bad_words=["x"], min_tokens=4,
         stop_token_ids=[5]), None),
    case("only what stops, too soon", CHAT, said(allowed_token_ids=[5], stop_token_ids=[5], min_tokens=2),
         "min_tokens"),
    case("a bad word without Unicode", COMPLETE, b'{"prompt": "a", "bad_words": ["\\ud800"]}', None),
    case("generate: logprobs without being asked", GENERATE, {"text": "a", "top_logprobs_num": 5}, "top_logprobs_num"),
    case("generate: logprobs past the prompt", GENERATE,
         {"text": "a", "return_logprob": True, "logprob_start_len": 1 << 30}, "logprob_start_len"),
    case("generate: logprobs past 64 bits", GENERATE,
         {"text": "a", "return_logprob": True, "logprob_start_len": 1 << 70}, "logprob_start_len"),
    case("generate: too many logprobs", GENERATE, {"text": "a", "return_logprob": True, "top_logprobs_num": 1000},
         "top_logprobs_num"),
    case("generate: a list of flags", GENERATE, {"text": "a", "return_logprob": [True]}, "return_logprob"),
    case("generate: a bias of lists", GENERATE, {"text": "a", "sampling_params": {"logit_bias": [[1, 2], [3]]}},
         "sampling_params"),
    case("generate: a bias twice", GENERATE, {"text": "a", "sampling_params": {"logit_bias": [[1, 2], [1, 3]]}},
         "sampling_params"),
    case("generate: bad words nested", GENERATE, {"text": "a", "sampling_params": {"bad_words": [["x"]]}},
         "sampling_params"),
    case("generate: allowed an object", GENERATE, {"text": "a", "sampling_params": {"allowed_token_ids": {"5": 1}}},
         "sampling_params"),
    case("generate without a prompt", GENERATE, {}, None),
    case("generate with both", GENERATE, {"text": "a", "input_ids": [1]}, None),
    case("generate: text a number", GENERATE, {"text": 1}, "text"),
    case("generate: ids unknown", GENERATE, {"input_ids": [10**6]}, "input_ids"),
    case("generate: parameters a string", GENERATE, {"text": "a", "sampling_params": "x"}, "sampling_params"),
    case("generate: a parameter unknown", GENERATE, {"text": "a", "sampling_params": {"temprature": 1}}, None),
    case("generate: NaN", GENERATE, b'{"text": "a", "sampling_params": {"temperature": NaN}}', None),
    case("generate: n huge", GENERATE, {"text": "a", "sampling_params": {"n": 1 << 40}}, None),
    case("tokenize nothing", TOKENIZE, {}, None),
    case("tokenize a number", TOKENIZE, {"prompt": 1}, "prompt"),
    case("detokenize nothing", DETOKENIZE, {}, "tokens"),
    case("detokenize unknown ids", DETOKENIZE, {"tokens": [-1]}, "tokens"),
    case("detokenize huge ids", DETOKENIZE, {"tokens": [1 << 70]}, "tokens"),
    case("detokenize strings", DETOKENIZE, {"tokens": "abc"}, "tokens"),
)  # fmt: skip

GOOD = json.dumps(plain()).encode()
ENDLESS = json.dumps(plain(max_tokens=150, ignore_eos=True, stream=True)).encode()
WIDE = json.dumps(plain(max_tokens=150, ignore_eos=True, stream=True, n=4)).encode()


def wire(name: str, *acts: Act, statuses: tuple[int, ...] = (400,), closes: bool = True, answers: int = 1) -> Case:
    return Case(name=name, acts=acts, statuses=frozenset(statuses), closes=closes, answers=answers)


WIRES: tuple[Case, ...] = (
    wire("not HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)),
    wire("noise", bytes(range(256)) * 40),
    wire("a line that never ends", b"GET /" + b"a" * (1 << 20)),
    wire("a path too long", head("/" + "a" * 60_000, 0, "GET"), statuses=(400, 404, 414, 431)),
    wire("a header too long", head(COMPLETE, 2, "POST", "x-long: " + "a" * 200_000) + b"{}", statuses=(400, 431)),
    wire("10,000 headers", head(COMPLETE, 2, "POST", *(f"x-{i}: {i}" for i in range(10_000))) + b"{}",
         statuses=(400, 431)),
    wire("a null byte in a header", head(COMPLETE, len(GOOD), "POST", "x-nul: a\0b") + GOOD),
    wire("a null byte in the path", head("/v1\0/models", None, "GET"), statuses=(400, 404)),
    wire("no host", b"GET /v1/models HTTP/1.1\r\nconnection: close\r\n\r\n", statuses=(200, 400)),
    wire("HTTP 9", b"GET /v1/models HTTP/9.9\r\nhost: x\r\n\r\n", statuses=(400, 505)),
    wire("HTTP 0.9", b"GET /v1/models\r\n\r\n", statuses=(200, 400)),
    wire("length not a number", head(COMPLETE, "ten") + GOOD),
    wire("length negative", head(COMPLETE, "-1") + GOOD),
    wire("length huge", head(COMPLETE, 10**30) + GOOD, "half", statuses=(400, 413)),
    wire("two lengths", head(COMPLETE, 5, "POST", "content-length: 6") + GOOD),
    wire("length and chunks", head(COMPLETE, 5, "POST", "transfer-encoding: chunked") + b"0\r\n\r\n"),
    wire("length too short", head(COMPLETE, 5) + GOOD),
    wire("length too long, then silence", head(COMPLETE, len(GOOD) + 10) + GOOD, 0.1, "half", statuses=(400, 408)),
    wire("length too long, then gone", head(COMPLETE, len(GOOD) + 10) + GOOD, "close"),
    wire("a body over the limit, announced", head(COMPLETE, 100 << 20) + b"x" * 1000, "half", statuses=(413,)),
    wire("a body over the limit, in chunks",
         head(COMPLETE, None, "POST", "transfer-encoding: chunked") + (b"100000\r\n" + b" " * (1 << 20) + b"\r\n") * 10
         + b"0\r\n\r\n", statuses=(413,)),
    wire("chunks of garbage", head(COMPLETE, None, "POST", "transfer-encoding: chunked") + b"zz\r\nhello\r\n"),
    wire("a chunk of negative size", head(COMPLETE, None, "POST", "transfer-encoding: chunked") + b"-5\r\nhello\r\n"),
    wire("a chunk of huge size",
         head(COMPLETE, None, "POST", "transfer-encoding: chunked") + b"f" * 40 + b"\r\nhello\r\n", "half"),
    wire("a chunk cut short", head(COMPLETE, None, "POST", "transfer-encoding: chunked") + b"ff\r\n{", "close"),
    wire("unknown transfer encoding", head(COMPLETE, None, "POST", "transfer-encoding: cats") + GOOD,
         statuses=(400, 501)),
    wire("an encoding that is not built", post(COMPLETE, bytes(20), "content-encoding: gzip"), statuses=(400, 415)),
    wire("GET with a body", head(COMPLETE, len(GOOD), "GET") + GOOD, statuses=(405,)),
    wire("DELETE", head(COMPLETE, 0, "DELETE"), statuses=(405,)),
    wire("PUT", head(COMPLETE, len(GOOD), "PUT") + GOOD, statuses=(405,)),
    wire("a method of one's own", head(COMPLETE, 0, "BREW"), statuses=(400, 405)),
    wire("CONNECT", b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com\r\nconnection: close\r\n\r\n",
         statuses=(400, 404, 405)),
    wire("POST to a GET route", head("/v1/models", 2) + b"{}", statuses=(405,)),
    wire("no such route", head("/v1/nothing", None, "GET"), statuses=(404,)),
    wire("out of the tree", head("/../../../../etc/passwd", None, "GET"), statuses=(400, 404)),
    wire("encoded out of the tree", head("/%2e%2e%2f%2e%2e%2fetc/passwd", None, "GET"), statuses=(400, 404)),
    wire("an upgrade to a web socket", head("/v1/chat/completions", None, "GET", "upgrade: websocket",
         "sec-websocket-version: 13", "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="), statuses=(400, 403, 404, 405)),
    wire("an upgrade to HTTP/2", head("/v1/models", None, "GET", "upgrade: h2c"), statuses=(200, 400)),
    wire("HTTP/2 at once", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)),
    wire("nothing, then gone", "close"),
    wire("nothing, then a reset", "reset"),
    wire("half a request line", b"POST /v1/com", "close"),
    wire("half of the headers", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconte", "half"),
    wire("a writer of one byte at a time", *(a for b in GOOD[:40] for a in (bytes([b]), 0.002)), "close"),
    wire("a slow writer that arrives", head(COMPLETE, len(GOOD)), *(a for b in GOOD for a in (bytes([b]), 0.002)),
         statuses=(200,), closes=False),
    wire("half closed after the request", post(COMPLETE, GOOD), "half", statuses=(200,)),
    wire("half closed, streamed", post(COMPLETE, ENDLESS), "half", statuses=(200,)),
    wire("gone before the answer", post(COMPLETE, GOOD), "close"),
    wire("a stream, closed at once", post(COMPLETE, ENDLESS), "close"),
    wire("a stream, reset at once", post(COMPLETE, ENDLESS), "reset"),
    wire("a stream, closed after a piece", post(COMPLETE, ENDLESS), "read", "close"),
    wire("a stream, reset after a piece", post(COMPLETE, WIDE), "read", "reset"),
    wire("a reader that sleeps", post(COMPLETE, WIDE), "read", 0.3, "read", 0.3, statuses=(200,), closes=False),
    wire("a reader that sleeps and goes", post(COMPLETE, WIDE), 0.3, "reset"),
    wire("three in a pipeline", (head(COMPLETE, len(GOOD)).replace(b"connection: close\r\n", b"") + GOOD) * 2
         + post(COMPLETE, GOOD), statuses=(200,), closes=False, answers=3),
    wire("a pipeline, then gone", post(COMPLETE, ENDLESS).replace(b"connection: close\r\n", b"") * 20, "close"),
    wire("a bad one in a pipeline", head(COMPLETE, 3).replace(b"connection: close\r\n", b"") + b"bad"
         + post(COMPLETE, GOOD), statuses=(400,), closes=False, answers=2),
    wire("a smuggled request", head(COMPLETE, len(GOOD), "POST", "transfer-encoding : chunked") + GOOD),
    wire("bare line feeds", post(COMPLETE, GOOD).replace(b"\r\n", b"\n"), statuses=(200, 400)),
    wire("folded headers", head(COMPLETE, len(GOOD), "POST", "x-a: b\r\n  c") + GOOD, statuses=(200, 400)),
    wire("expect, and never goes on", head(COMPLETE, 100 << 20, "POST", "expect: 100-continue"), "half",
         statuses=(413, 417)),
)  # fmt: skip

HARMLESS: tuple[Case, ...] = (
    wire("keys twice", post(COMPLETE, b'{"prompt": "a", "max_tokens": 4, "max_tokens": 5}'), statuses=(200, 400)),
    wire("null everywhere", post(COMPLETE, json.dumps(dict.fromkeys(SAMPLED) | plain()).encode()),
         statuses=(200,), closes=False),
    wire("unknown fields", post(CHAT, json.dumps(said(**{f"x{i}": i for i in range(1000)})).encode()),
         statuses=(200,), closes=False),
    wire("an unknown field of 1 MB", post(CHAT, json.dumps(said(x="y" * (1 << 20))).encode()),
         statuses=(200,), closes=False),
    wire("a null byte in the prompt", post(COMPLETE, json.dumps(plain(prompt="a\0b")).encode()),
         statuses=(200, 400), closes=False),
    wire("special tokens as text", post(COMPLETE, json.dumps(plain(prompt="</s><s><unk>")).encode()),
         statuses=(200,), closes=False),
    wire("absurd request id", post(COMPLETE, GOOD, "x-request-id: " + "z" * 5000), statuses=(200, 400), closes=False),
    wire("an id that breaks lines", post(COMPLETE, GOOD, "x-request-id: a\tb\x7f"), statuses=(200, 400)),
    wire("another type of content", post(COMPLETE, GOOD).replace(b"application/json", b"text/html"),
         statuses=(200, 400, 415), closes=False),
)  # fmt: skip

CORPUS: tuple[Case, ...] = (*fields(), *BODIES, *WIRES, *HARMLESS)
