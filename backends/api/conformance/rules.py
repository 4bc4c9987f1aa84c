"""Checks: the order of calls, what is refused, what fails alone."""

from __future__ import annotations

from functools import partial

from backends.api.build import Host
from backends.api.conformance.bench import (
    SPEC,
    Ask,
    Opener,
    Weights,
    blank,
    one,
    prompt,
    refused,
    take,
)
from backends.api.conformance.violations import violations
from backends.api.step import NONFINITE, OK, ScheduleStep
from engine.errors import BackendLost


def order(open: Opener) -> None:
    """sample before the next forward, at most `depth` steps out, collected oldest first; a refusal costs nothing."""
    host, ids = open(), prompt(5)
    want = one(host, Ask(prompt=ids, make=6)).tokens
    backend, text, made = host.backend, host.open(), blank(1)
    ticket = backend.forward(host.step([(text, host.row(text, ids))]))
    early = _another(host)
    refused(lambda: backend.forward(early))
    refused(lambda: backend.sample(ticket + 1000))
    backend.sample(ticket)
    refused(lambda: backend.sample(ticket))
    out = [ticket]
    while len(out) < host.limits.depth:
        out.append(host.enqueue([(text, host.row(text, [-1]))]))
    deep = _another(host)
    refused(lambda: backend.forward(deep))
    if len(out) > 1:
        refused(lambda: backend.collect(out[-1]))
    refused(lambda: backend.collect(ticket + 1000))
    for ticket in out:
        take(backend.collect(ticket), made)
    refused(lambda: backend.collect(out[-1]))
    while len(made[0]) < 6:
        take(host.run([(text, host.row(text, [-1]))]), made)
    host.close(text)
    assert made[0] == want


def _another(host: Host) -> ScheduleStep:
    """A good step of another text, which the host forgets at once."""
    text = host.open()
    step = host.step([(text, host.row(text, [1, 2]))])
    host.close(text)
    return step


def refusals(open: Opener) -> None:
    """Bad values and features that aren't built are refused by name before anything is enqueued: the same step, put
    right, gives what it would have given."""
    host, asks = open(), [Ask(prompt=prompt(5), make=4), Ask(prompt=prompt(7), make=4)]
    want = [one(host, ask).tokens for ask in asks]
    texts, made = [host.open() for _ in asks], blank(2)
    take(host.run([(text, host.row(text, ask.prompt)) for text, ask in zip(texts, asks, strict=True)]), made)
    for _ in range(3):
        good = host.step([(text, host.row(text, [-1])) for text in texts])
        for bad in violations(good, host.limits):
            refused(partial(host.backend.forward, bad.step), bad.field, bad.rows, bad.what)
        host.backend.sample(host.backend.forward(good))
        take(host.backend.collect(good.step), made)
    for text in texts:
        host.close(text)
    assert made == want


def nonfinite(open: Opener) -> None:
    """Non-finite logits fail their row, by status, and no other; the slot and its pages serve the next text."""
    host, asks = open(), [Ask(prompt=prompt(n, seed=n), make=3) for n in (3, 5, 6)]
    want = [one(host, ask).tokens for ask in asks]
    poison = min(set(range(SPEC.vocab)) - {t for ask in asks for t in ask.prompt} - {t for w in want for t in w})
    host.backend.load(Weights(poison=[poison]), version=4)
    feed = [asks[0].prompt, [*asks[1].prompt, poison, 3], asks[2].prompt]
    texts, made = [host.open() for _ in feed], blank(3)
    for step in range(3):
        rows = [(text, host.row(text, ids if step == 0 else [-1])) for text, ids in zip(texts, feed, strict=True)]
        result = host.run(rows)
        assert result.version == 4
        assert result.status.tolist() == [OK, NONFINITE, OK]
        assert result.counts.tolist() == [1, 0, 1]
        take(result, made)
    for text in texts:
        host.close(text)
    host.backend.load(Weights())
    assert made[::2] == want[::2]
    assert [one(host, ask).tokens for ask in asks] == want


def weights(open: Opener) -> None:
    """Weights are taken anew in the order of the calls: a step that is out keeps the old ones and their version."""
    host, ids = open(), prompt(9, seed=3)
    old = one(host, Ask(prompt=ids, make=1)).tokens
    host.backend.load(Weights(seed=1), version=2)
    new = one(host, Ask(prompt=ids, make=1)).tokens
    assert old != new
    text = host.open()
    ticket = host.enqueue([(text, host.row(text, ids))])
    host.backend.load(Weights(), version=3)
    result = host.backend.collect(ticket)
    host.close(text)
    assert (result.version, result.tokens[0, :1].tolist()) == (2, new)
    assert host.backend.status().version == 3
    assert one(host, Ask(prompt=ids, make=1)).tokens == old


def closed(open: Opener) -> None:
    """A closed backend is gone for good and says so."""
    host = open(fresh=True)
    text = host.open()
    step = host.step([(text, host.row(text, prompt(3)))])
    host.backend.close()
    try:
        host.backend.forward(step)
    except BackendLost:
        return
    raise AssertionError("a closed backend took a step")
