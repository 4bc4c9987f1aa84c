"""Checks: tokens are those of the normative choice, by the logits that the backend itself had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.api.build import Host, Text
from backends.api.choice import Choice
from backends.api.conformance.bench import (
    SPEC,
    Ask,
    Made,
    Opener,
    blank,
    compare,
    generate,
    one,
    prompt,
)
from backends.api.ties import admissible

ROUNDING = 2e-6
"""What float32 may lose between two ways of writing the same filter, in logits."""
SEEDS = [0, 1, 2**32 - 1, 2**32 + 7, 0xDEADBEEF_12345678, 2**64 - 1]


def noise(open: Opener) -> None:
    """A seed gives the same tokens whatever the batch and the slot, and they are those of the normative noise."""
    host = open()
    asks = [Ask(prompt=prompt(3 + i), make=8, values={"temperature": 1.0, "seed": s}) for i, s in enumerate(SEEDS)]
    together = generate(host, asks)
    blocked = [host.open() for _ in range(2)]
    compare(together, [one(host, ask) for ask in asks], asks)
    for text in blocked:
        host.close(text)
    compare(together, generate(host, asks, reverse=True), asks)
    for made, ask in zip(together, asks, strict=True):
        _normative(made, ask)


def filters(open: Opener) -> None:
    """top-k, top-p and min-p, alone and together, leave what the normative filters leave."""
    host, draw = open(), np.random.default_rng(5)
    asks = []
    for i in range(60):
        values: dict[str, Any] = {"temperature": float(draw.choice([0.05, 0.7, 1.0, 2.5])), "seed": 1000 + i}
        if i % 4 != 1:
            values["top_k"] = int(draw.choice([1, 2, 5, 40, SPEC.vocab, 1000]))
        if i % 4 != 2:
            values["top_p"] = float(np.float32(draw.choice([1e-6, 0.1, 0.5, 0.9, 0.999])))
        if i % 4 != 3:
            values["min_p"] = float(np.float32(draw.choice([0.01, 0.1, 0.5, 1.0])))
        asks.append(Ask(prompt=prompt(2, seed=i), make=4, values=values))
    most = min(host.limits.max_rows, host.limits.slots)
    for at in range(0, len(asks), most):
        part = asks[at : at + most]
        for made, ask in zip(generate(host, part), part, strict=True):
            _normative(made, ask)


def _normative(made: Made, ask: Ask) -> None:
    """Assert that each token is the one that the normative choice takes from the logits that the backend had."""
    for j, (token, logits) in enumerate(zip(made.tokens, made.logits, strict=False)):
        right = admissible(token, logits, Choice(**ask.values), len(ask.prompt) + j, ROUNDING)
        assert right, f"token {j} of {ask.values} is {token}"


@dataclass(slots=True, kw_only=True)
class Penalised:
    """A text with penalties, and what the host expects the device to know of it."""

    text: Text
    values: dict[str, Any]
    choice: Choice
    seen: NDArray[np.bool_]
    made: NDArray[np.int32]


def _penalised(
    host: Host, ids: list[int], earlier: list[int], pairs: list[tuple[int, float]], **values: Any
) -> Penalised:
    """A text whose prompt is `ids` and which had put out `earlier` before it was seated."""
    made, bias = np.zeros(SPEC.vocab, np.int32), np.zeros(SPEC.vocab, np.float32)
    np.add.at(made, earlier, 1)
    seen = made > 0
    seen[ids] = True
    for token, value in pairs:
        bias[token] = value
    choice = Choice(**values, seen=seen, made=made, bias=bias)
    return Penalised(text=host.open(), values={**values, "bias": pairs}, choice=choice, seen=seen, made=made)


def penalties(open: Opener) -> None:
    """Repetition, presence and frequency penalties and bias, over a history and what was made since."""
    host, ids, earlier = open(), prompt(5), [5, 5, 9]
    if not host.limits.max_history or not host.taps:
        return
    history = [(t, 0) for t in ids] + [(t, 1) for t in earlier]
    for penalty in ((1.7, 0.0, 0.0), (1.0, 1.5, 0.0), (1.0, 0.0, 0.8), (0.6, -1.0, 0.3)):
        biases = ([(5, 0.5), (40, 1.5)], [(7, 3.0)]) if host.limits.max_bias else ([], [])
        rows = [
            _penalised(host, ids, earlier, biases[0], penalty=penalty, temperature=0.8, seed=3),
            _penalised(host, ids, earlier, biases[1], penalty=(1.0, 0.5, 0.5), temperature=0.8, seed=3),
        ]
        for step in range(10):
            feed: dict[str, Any] = {"tokens": ids + earlier, "history": history} if step == 0 else {"tokens": [-1]}
            result = host.run([(p.text, host.row(p.text, **feed, **p.values)) for p in rows])
            last = np.arange(1, 3) * len(feed["tokens"]) - 1
            for p, token, at in zip(rows, result.tokens[:, 0].tolist(), last, strict=True):
                position = len(ids) + len(earlier) + step
                right = admissible(token, result.taps["logits"][at], p.choice, position, ROUNDING)
                assert right, f"token {step} of {p.values} is {token}"
                p.made[token] += 1
                p.seen[token] = True
        for p in rows:
            host.close(p.text)


def masks(open: Opener) -> None:
    """Masked rows choose among the tokens that their own masks allow; a row between them is free."""
    host, draw, ids = open(), np.random.default_rng(2), prompt(5)
    if not host.limits.max_masks:
        return
    free, made = one(host, Ask(prompt=ids, make=6)).tokens, blank(1)
    texts = [host.open() for _ in range(3)]
    for step in range(6):
        allowed = draw.random((2, SPEC.vocab)) < 0.1
        allowed[:, SPEC.vocab - 1] = True
        words = np.zeros((2, 1 + host.limits.max_draft, -(-SPEC.vocab // 32)), np.uint32)
        for m, v in np.argwhere(allowed):
            words[m, 0, v // 32] |= np.uint32(1 << (v % 32))
        feed = ids if step == 0 else [-1]
        rows = [(text, host.row(text, feed, masked=i != 1)) for i, text in enumerate(texts)]
        result = host.run(rows, words)
        made[0].append(int(result.tokens[1, 0]))
        for m, r in enumerate((0, 2)):
            token = int(result.tokens[r, 0])
            assert allowed[m, token]
            if result.taps:
                logits = result.taps["logits"][(r + 1) * len(feed) - 1]
                assert admissible(token, logits, Choice(allowed=allowed[m]), 0, ROUNDING)
    for text in texts:
        host.close(text)
    assert made == [free]


def drafts(open: Opener) -> None:
    """Guesses change no token: the right ones are accepted, the first wrong one is replaced, greedy and sampled."""
    host = open()
    most = host.limits.max_draft
    if not most:
        return
    ids = prompt(6, seed=1)
    for values in ({}, {"temperature": 1.0, "seed": 77}):
        want = one(host, Ask(prompt=ids, make=16, values=values)).tokens
        for right in range(most + 1):
            text = host.open()
            made = host.run([(text, host.row(text, ids, **values))]).tokens[0, :1].tolist()
            while len(made) + most < len(want):
                guesses = want[len(made) : len(made) + most]
                if right < most:
                    guesses[right] = (guesses[right] + 1) % SPEC.vocab
                result = host.run([(text, host.row(text, [-1, *guesses], drafts=most, **values))])
                assert result.counts[0] == right + 1
                made += result.tokens[0, : right + 1].tolist()
                assert (result.tokens[0, right + 1 :] == -1).all()
                text.upper -= most - right
            host.close(text)
            assert made == want[: len(made)]
