"""The bench of the conformance suite: a small model with honest random weights, requests, and how runs are compared."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.api.build import TOLERANCE, Host, Placed
from backends.api.check import tap_names
from backends.api.choice import Choice, scores
from backends.api.protocol import Backend
from backends.api.step import F32, OK, StepResult
from backends.api.ties import margin, near_tie
from engine.config import Resolved
from engine.errors import StepRefused
from engine.model.params import params
from engine.model.spec import EIGHT, Attention, Layer, Mlp, ModelSpec, Rope, eight

STEP = 0.05
"""The tolerance where the cache has 8 bits: a number between two of its steps may become either."""
PAGE, WINDOW, MAX_LEN = 4, 8, 64

_ATTENTION = Attention(q_heads=4, kv_heads=2, head_dim=16, rope=Rope(dim=16, theta=10000.0), scale=16**-0.5)
SPEC = ModelSpec(
    family="conformance",
    vocab=120,  # no multiple of 32, so that masks have a rest
    hidden=32,
    layers=(
        Layer(mixer=replace(_ATTENTION, qk_norm=True), feed=Mlp(size=48)),
        Layer(mixer=replace(_ATTENTION, window=WINDOW, bias=True), feed=Mlp(size=48)),
    ),
    norm_eps=1e-6,
    tied=False,
    max_len=MAX_LEN,
    dtype="float32",
)


class Weights:
    """Random weights, the same for the same seed: sharp attention, logits with a standard deviation of about 2.5.

    poison: tokens whose embedding is NaN.
    """

    def __init__(self, seed: int = 0, poison: Sequence[int] = (), spec: ModelSpec = SPEC) -> None:
        self.seed, self.poison, self.params = seed, list(poison), params(eight(spec, EIGHT[0]))

    def read(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
        p = self.params[name]
        noise = np.random.default_rng([self.seed, zlib.crc32(name.encode())]).standard_normal(p.shape)
        if "norm" in name:
            value = 1 + 0.2 * noise
        elif name == "embed":
            value = noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif name.endswith("scales"):  # of a cache of 8 bits: some numbers are past its largest
            value = np.exp(0.2 * noise) * [[0.04], [0.02]]
        else:
            fan_in = int(np.prod(p.shape)) // p.shape[0] if len(p.shape) == 2 or name.endswith("out") else p.shape[-1]
            sharp = 2.0 if name.endswith((".q", ".k")) else 2.5 if name == "head" else 1.0
            value = sharp * noise / fan_in**0.5
        value = value.astype(np.float32)
        if name == "embed":
            value[self.poison] = np.nan
        return value[part]


def config(backend: str, **overrides: Any) -> Resolved:
    """The configuration that the suite runs with: few small buckets, small pages."""
    values: dict[str, Any] = {
        "platform": "cpu",
        "dtype": "float32",
        "cache_dtype": "float32",
        "max_len": MAX_LEN,
        "page": PAGE,
        "pages": (64, 64),
        "slots": 8,
        "max_rows": 6,
        "max_tokens": 16,
        "token_buckets": (1, 16),
    }
    return Resolved(backend=backend, **(values | overrides))


class Opener:
    """Opens the backend under test. The same settings give the same backend again, as earlier checks left it."""

    def __init__(self, make: Callable[[ModelSpec, Resolved], Backend], config: Resolved) -> None:
        self.make, self.config = make, config
        self.kept: dict[str, Host] = {}

    def __call__(self, *, warm: bool = False, fresh: bool = False, **overrides: Any) -> Host:
        """A host on a loaded backend. warm: programs are built and nothing compiles from then on, so no taps.
        fresh: of its own. overrides: fields of Resolved."""
        key = repr((warm, sorted(overrides.items())))
        if key in self.kept and not fresh:
            return self.kept[key]
        config = replace(self.config, **overrides)
        host = Host(self.make(SPEC, config), tolerance=STEP if config.cache_dtype in EIGHT else TOLERANCE)
        host.backend.load(Weights())
        if warm:
            host.backend.warmup()
        elif host.limits.taps:  # always all of them, so that a backend which compiles has one program a bucket
            host.taps = tuple(sorted(tap_names(len(SPEC.layers), experts=False)))
        if not fresh:
            self.kept[key] = host
        return host

    def close(self) -> None:
        """Close the backends that were kept. After a check that failed, the next ones get new ones so."""
        for host in self.kept.values():
            host.backend.close()
        self.kept.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request of the suite. chunk: tokens of the prompt per step. values: of sampling, as in Row."""

    prompt: Sequence[int]
    make: int = 6
    chunk: int = 16
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Made:
    """What came of it: tokens, and the logits float32[V] that each was chosen from, where they are tapped.
    tolerance: of the host that ran it."""

    tokens: list[int] = field(default_factory=list)
    logits: list[F32] = field(default_factory=list)
    tolerance: float = TOLERANCE


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    ids: list[int] = np.random.default_rng([length, seed]).integers(0, SPEC.vocab, length).tolist()
    return ids


def generate(host: Host, asks: Sequence[Ask], *, reverse: bool = False) -> list[Made]:
    """Run requests side by side, each feeding its next chunk or its last token; what has no room waits a step."""
    texts, fed, made = [host.open() for _ in asks], [0] * len(asks), [Made(tolerance=host.tolerance) for _ in asks]
    while True:
        room, rows, who = host.limits.max_tokens, list[Placed](), list[tuple[int, bool]]()
        for i, ask in enumerate(asks):
            rest = list(ask.prompt[fed[i] : fed[i] + ask.chunk])
            tokens = rest or [-1]
            if len(made[i].tokens) >= ask.make or len(tokens) > room or len(rows) >= host.limits.max_rows:
                continue
            room -= len(tokens)
            fed[i] += len(rest)
            ends = fed[i] >= len(ask.prompt)
            more = {"history": [(t, 0) for t in ask.prompt]} if fed[i] == len(rest) and "penalty" in ask.values else {}
            rows.append((texts[i], host.row(texts[i], tokens, output=int(ends), **more, **ask.values)))
            who.append((i, ends))
        if not rows:
            break
        if reverse:
            rows, who = rows[::-1], who[::-1]
        result = host.run(rows)
        last = np.cumsum([len(row.tokens) for _, row in rows]) - 1
        for r, (i, ends) in enumerate(who):
            assert result.status[r] == OK, f"status {result.status[r]} of a row with finite weights"
            assert result.counts[r] == int(ends), f"{result.counts[r]} tokens of a row that ends its prompt: {ends}"
            if ends:
                made[i].tokens.append(int(result.tokens[r, 0]))
                if host.taps:
                    made[i].logits.append(np.array(result.taps["logits"][last[r]], np.float32))
    for text in texts:
        host.close(text)
    return made


def choice_of(values: dict[str, Any], ids: Sequence[int], made: Sequence[int]) -> Choice:
    """What the normative sampler is told of a row. values: of Row; ids: the prompt; made: put out so far."""
    known = {name: value for name, value in values.items() if name in Choice.__dataclass_fields__ and name != "bias"}
    counts, bias = np.zeros(SPEC.vocab, np.int32), np.zeros(SPEC.vocab, np.float32)
    np.add.at(counts, list(made), 1)
    seen = counts > 0
    seen[list(ids)] = True
    for token, value in values.get("bias", ()):
        bias[token] += value
    return Choice(**known, seen=seen, made=counts, bias=bias)


def alike(a: Made, b: Made, values: dict[str, Any] | None = None, ids: Sequence[int] = ()) -> None:
    """Assert that two runs of one request agree: logits within tolerance, tokens up to near-ties.

    values: how it was sampled; ids: its prompt.
    """
    at = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), None)
    upto = None if at is None else at + 1
    difference = 0.0
    for x, y in zip(a.logits[:upto], b.logits[:upto], strict=True):
        difference = max(difference, float(np.abs(x - y).max()))
        assert difference <= a.tolerance * max(1.0, float(x.std())), f"logits differ by {difference:g}"
    if at is None:
        return
    assert a.logits, f"token {at} differs: {a.tokens[at]} and {b.tokens[at]}"
    choice = choice_of(values or {}, ids, a.tokens[:at])
    gap = margin(scores(a.logits[at], choice, len(ids) + at)) * (choice.temperature or 1.0)
    assert near_tie(gap, difference), f"token {at} differs, margin {gap:g}, logit difference {difference:g}"


def compare(a: Sequence[Made], b: Sequence[Made], asks: Sequence[Ask]) -> None:
    """`alike` for each request."""
    for x, y, ask in zip(a, b, asks, strict=True):
        alike(x, y, ask.values, ask.prompt)


def one(host: Host, ask: Ask, **more: Any) -> Made:
    """A request alone."""
    return generate(host, [ask], **more)[0]


def refused(call: Callable[[], object], field: str = "", rows: Sequence[int] | None = None, what: str = "") -> None:
    """Assert that a call raises StepRefused, naming the field and, where given, the rows."""
    try:
        call()
    except StepRefused as refusal:
        error = refusal
    else:
        raise AssertionError(f"not refused: {field}, {what}")
    assert not field or error.field == field, f"refused for {error.field}, not for {field}, {what}: {error}"
    assert rows is None or error.rows == tuple(rows), f"rows {error.rows}, not {tuple(rows)}, {what}: {error}"


def blank(count: int) -> list[list[int]]:
    """`count` empty lists of tokens."""
    return [[] for _ in range(count)]


def take(result: StepResult, made: Sequence[list[int]]) -> None:
    """Append each row's first token to the list of its text."""
    for tokens, token in zip(made, result.tokens[:, 0].tolist(), strict=True):
        tokens.append(token)


ASKS = [
    Ask(prompt=prompt(11), chunk=3),
    Ask(prompt=prompt(5), make=9),
    Ask(prompt=prompt(14), chunk=7),
    Ask(prompt=prompt(1), make=9),
]

FULL = [
    Ask(prompt=prompt(6), make=9, values={"penalty": (1.4, 0.0, 0.0)}),
    Ask(
        prompt=prompt(5),
        make=9,
        chunk=2,
        values={"penalty": (0.8, 0.6, 0.3), "temperature": 0.9, "seed": 5, "top_p": 0.9},
    ),
    Ask(prompt=prompt(9), make=9, chunk=4, values={"bias": [(3, 2.0), (70, -9.0), (90, 1.5)]}),
    Ask(prompt=prompt(7), make=9, chunk=3, values={"logprobs": 5, "prompt_logprobs": (2, 3), "temperature": 1.2}),
    Ask(prompt=prompt(4), make=9, values={"bias": [(8, 4.0)], "penalty": (1.0, 0.0, 1.5), "logprobs": 0, "top_k": 9}),
]
"""Requests that ask for all of sampling but masks, which `generate` has none of."""
