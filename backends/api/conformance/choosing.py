"""Checks: tokens are those of the normative choice, by the logits that the backend itself had."""

from __future__ import annotations

from typing import Any

import numpy as np

from backends.api.choice import Choice
from backends.api.conformance.bench import (
    SPEC,
    Ask,
    Made,
    Opener,
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


def penalties(open: Opener) -> None:
    """Repetition, presence and frequency penalties and bias, over a history and what was made since."""
    host = open()
    if not host.limits.max_history or not host.taps:
        return
    for penalty in ((1.7, 0.0, 0.0), (1.0, 1.5, 0.0), (1.0, 0.0, 0.8), (0.6, -1.0, 0.3)):
        ids, earlier = prompt(6), [5, 5, 9]
        text, made = host.open(), np.zeros(SPEC.vocab, np.int32)
        np.add.at(made, earlier, 1)
        seen = made > 0
        seen[ids] = True
        history = [(t, 0) for t in ids] + [(t, 1) for t in earlier]
        pairs = [(5, 0.5), (40, 1.5)] if host.limits.max_bias else []
        bias = np.zeros(SPEC.vocab, np.float32)
        for token, value in pairs:
            bias[token] = value
        for step in range(10):
            feed: dict[str, Any] = {"tokens": ids + earlier, "history": history} if step == 0 else {"tokens": [-1]}
            row = host.row(text, penalty=penalty, bias=pairs, temperature=0.8, seed=3, **feed)
            result = host.run([(text, row)])
            token, position = int(result.tokens[0, 0]), len(ids) + len(earlier) + step
            choice = Choice(
                temperature=float(np.float32(0.8)),
                seed=3,
                penalty=penalty,
                seen=seen,
                made=made,
                bias=bias if pairs else None,
            )
            assert admissible(token, result.taps["logits"][-1], choice, position, ROUNDING), (penalty, step, token)
            made[token] += 1
            seen[token] = True
        host.close(text)


def masks(open: Opener) -> None:
    """A masked row chooses among the tokens that its mask allows; a row beside it is free."""
    host = open()
    if not host.limits.max_masks:
        return
    draw, ids = np.random.default_rng(2), prompt(5)
    free = one(host, Ask(prompt=ids, make=6)).tokens
    texts, made = [host.open() for _ in range(2)], []
    for step in range(6):
        allowed = draw.random(SPEC.vocab) < 0.1
        allowed[SPEC.vocab - 1] = True
        words = np.zeros((1, 1 + host.limits.max_draft, -(-SPEC.vocab // 32)), np.uint32)
        for v in np.flatnonzero(allowed):
            words[0, 0, v // 32] |= np.uint32(1 << (v % 32))
        feed = ids if step == 0 else [-1]
        rows = [(texts[0], host.row(texts[0], feed)), (texts[1], host.row(texts[1], feed, masked=True))]
        result = host.run(rows, words)
        made.append(int(result.tokens[0, 0]))
        token = int(result.tokens[1, 0])
        assert allowed[token]
        if result.taps:
            assert admissible(token, result.taps["logits"][-1], Choice(allowed=allowed), 0, ROUNDING)
    for text in texts:
        host.close(text)
    assert made == free


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
