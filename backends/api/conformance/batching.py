"""Checks: how tokens are spread over steps and rows changes nothing."""

from __future__ import annotations

import numpy as np

from backends.api.check import tap_names
from backends.api.conformance.bench import (
    ASKS,
    FULL,
    PAGE,
    SPEC,
    WINDOW,
    Ask,
    Opener,
    Weights,
    alike,
    blank,
    compare,
    generate,
    one,
    prompt,
    take,
)
from backends.api.step import Ticket


def chunks(open: Opener) -> None:
    """A prompt whole, in chunks and token by token gives the same logits and tokens."""
    host, ids = open(), prompt(15)
    whole = one(host, Ask(prompt=ids, make=10))
    for size in (1, 3, 4, 7):
        alike(whole, one(host, Ask(prompt=ids, make=10, chunk=size)))


def batches(open: Opener) -> None:
    """Rows do not influence one another: together and alone, in any order of rows."""
    host = open()
    alone = [one(host, ask) for ask in ASKS]
    compare(alone, generate(host, ASKS), ASKS)
    compare(alone, generate(host, ASKS, reverse=True), ASKS)


def lengths(open: Opener) -> None:
    """Prompts that end before, on and behind the edges of pages and of the window see just what they should."""
    host, ids = open(), prompt(40, seed=1)
    if not host.taps:
        return
    text, seen = host.open(), []
    for at in range(0, len(ids), 8):
        seen.append(host.run([(text, host.row(text, ids[at : at + 8]))]).taps["logits"])
    host.close(text)
    truth = np.concatenate(seen)
    for n in sorted({p * PAGE + d for p in (1, 2, 3, 9) for d in (-1, 0, 1)} | {WINDOW - 1, WINDOW, WINDOW + 1}):
        made = one(host, Ask(prompt=ids[:n], make=1, chunk=5))
        difference = np.abs(made.logits[0] - truth[n - 1]).max()
        allowed = host.tolerance * max(1.0, truth[n - 1].std())
        assert difference <= allowed, f"length {n}: logits differ by {difference:g}"


def brim(open: Opener) -> None:
    """As many rows and as many tokens as the limits allow, and a text up to the last position."""
    host = open()
    rest = host.limits.max_tokens - host.limits.max_rows + 1
    asks = [Ask(prompt=prompt(1, seed=i), make=3) for i in range(host.limits.max_rows - 1)]
    asks.append(Ask(prompt=prompt(rest), make=3))
    compare([one(host, ask) for ask in asks], generate(host, asks), asks)
    ids = prompt(host.limits.max_len - 3)
    alike(one(host, Ask(prompt=ids, make=4)), one(host, Ask(prompt=ids, make=4, chunk=5)))


def ahead(open: Opener) -> None:
    """Rows go on from the device's own length and token, `depth` steps ahead of what the host has collected."""
    host = open()
    asks = [Ask(prompt=prompt(5), make=7), Ask(prompt=prompt(9), make=7)]
    want = [one(host, ask).tokens for ask in asks]
    texts, made, out = [host.open() for _ in asks], blank(len(asks)), list[Ticket]()
    for step in range(7):
        feed = [ask.prompt if step == 0 else [-1] for ask in asks]
        if len(out) == host.limits.depth:
            take(host.backend.collect(out.pop(0)), made)
        out.append(host.enqueue([(text, host.row(text, f)) for text, f in zip(texts, feed, strict=True)]))
    for ticket in out:
        take(host.backend.collect(ticket), made)
    for text in texts:
        host.close(text)
    assert made == want


def warm(open: Opener) -> None:
    """After warmup nothing compiles, whatever the sizes of the steps, and the tokens stay the same."""
    cold, host = open(), open(warm=True)
    asks = [*ASKS, Ask(prompt=prompt(40), make=3), Ask(prompt=prompt(7), values={"temperature": 1.0, "seed": 3})]
    full = FULL if host.limits.max_history and host.limits.max_bias and host.limits.max_logprobs else []
    want = generate(cold, asks) + generate(cold, full)
    made = generate(host, asks) + generate(host, full)
    host.backend.load(Weights(), version=8)
    again = [one(host, ask) for ask in (*asks, *full)]
    assert [m.tokens for m in made] == [m.tokens for m in again] == [m.tokens for m in want]
    status = host.backend.status()
    assert (status.ready, status.version, status.compiles_after_ready) == (True, 8, 0)


def taps(open: Opener) -> None:
    """Every inner value that can be named comes back, one entry a fed token, and they add up."""
    host, asks = open(), [prompt(4, seed=2), prompt(3, seed=5)]
    if not host.taps:
        return
    texts, whole = [host.open() for _ in asks], (slice(None), slice(None))
    result = host.run([(text, host.row(text, ids)) for text, ids in zip(texts, asks, strict=True)])
    for text in texts:
        host.close(text)
    found, source = dict(result.taps), Weights()
    assert set(found) == tap_names(len(SPEC.layers), experts=False)
    x = source.read("embed", whole)[asks[0] + asks[1]]
    assert np.abs(x - found["embed"]).max() == 0
    for i in range(len(SPEC.layers)):
        x = x + found[f"layers.{i}.attention"] + found[f"layers.{i}.mlp"]
        assert np.abs(x - found[f"layers.{i}"]).max() < 1e-4
    logits = found["final_norm"] @ source.read("head", whole).T
    assert np.abs(logits - found["logits"]).max() < 1e-3
    assert result.tokens[:, 0].tolist() == found["logits"][[3, 6]].argmax(axis=1).tolist()
