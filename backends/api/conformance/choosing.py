"""Checks: tokens are those of the normative choice, by the logits that the backend itself had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    choice_of,
    compare,
    generate,
    one,
    prompt,
    refused,
    take,
)
from backends.api.step import StepResult, Ticket
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
class Followed:
    """A text whose tokens are checked one by one, and what the host expects the device to know of it.

    ids: its prompt; earlier: what it had put out before it was seated. values: of its rows.
    """

    text: Text
    ids: list[int]
    earlier: list[int]
    values: dict[str, Any]
    choice: Choice
    made: list[int] = field(default_factory=list)

    def feed(self) -> dict[str, Any]:
        """What its next row carries."""
        if self.made:
            return {"tokens": [-1], **self.values}
        history = [(t, 0) for t in self.ids] + [(t, 1) for t in self.earlier]
        sent = {"history": history} if "penalty" in self.values else {}
        return {"tokens": self.ids + self.earlier, **sent, **self.values}

    def take(self, token: int, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> None:
        """Assert that a token is the normative choice, then count it."""
        choice = replace(self.choice, allowed=allowed)
        position = len(self.ids) + len(self.earlier) + len(self.made)
        right = admissible(token, logits, choice, position, ROUNDING)
        assert right, f"token {len(self.made)} of {self.values} is {token}"
        self.made.append(token)
        assert self.choice.made is not None
        assert self.choice.seen is not None
        self.choice.made[token] += 1
        self.choice.seen[token] = True


def follow(host: Host, ids: list[int], earlier: Sequence[int] = (), **values: Any) -> Followed:
    """A text to be followed. values: fields of Row; bias: (token, value) pairs."""
    choice = choice_of(values, ids, earlier)
    return Followed(text=host.open(), ids=ids, earlier=list(earlier), values=values, choice=choice)


def step_on(host: Host, rows: Sequence[Followed], allowed: Sequence[NDArray[np.bool_] | None] = ()) -> StepResult:
    """One step of all, each token checked. allowed: what each may choose from, None = everything."""
    may = list(allowed) or [None] * len(rows)
    feed = [row.feed() | ({} if a is None else {"masked": True}) for row, a in zip(rows, may, strict=True)]
    given = [a for a in may if a is not None]
    words = np.zeros((len(given), 1 + host.limits.max_draft, -(-SPEC.vocab // 32)), np.uint32)
    for m, v in np.argwhere(np.array(given)) if given else ():
        words[m, 0, v // 32] |= np.uint32(1 << (v % 32))
    result = host.run(
        [(r.text, host.row(r.text, **f)) for r, f in zip(rows, feed, strict=True)], words if given else None
    )
    last = np.cumsum([len(f["tokens"]) for f in feed]) - 1
    for r, row in enumerate(rows):
        row.take(int(result.tokens[r, 0]), result.taps["logits"][last[r]], may[r])
    return result


def penalties(open: Opener) -> None:
    """Repetition, presence and frequency penalties, over a history and what was made since, beside a row without. Bias
    brings the tokens of the history back to where a penalty decides."""
    host, ids, earlier = open(), prompt(2), [5, 9, 5]
    if not host.limits.max_history or not host.taps:
        return
    for penalty in ((1.7, 0.0, 0.0), (1.0, 1.5, 0.0), (1.0, 0.0, 0.8), (0.6, -1.0, 0.3)):
        likely: dict[str, Any] = {"bias": [(t, 5.0) for t in (*ids, *set(earlier))]} if host.limits.max_bias else {}
        drawn: dict[str, Any] = {"temperature": 0.8, "seed": 3}
        rows = [
            follow(host, ids, earlier, penalty=penalty, **drawn, **likely),
            follow(host, ids, **drawn),
            follow(host, ids, earlier, penalty=(1.0, 0.5, 0.5), **drawn),
            follow(host, ids, penalty=penalty, **likely),
        ]
        for _ in range(10):
            step_on(host, rows)
        for row in rows:
            host.close(row.text)


def counts(open: Opener) -> None:
    """Counts are right with steps in flight, after a preemption, and for the next tenant of a slot."""
    host, ids = open(), prompt(7)
    values: dict[str, Any] = {"penalty": (1.3, 0.4, 0.9), "temperature": 0.7, "seed": 8}
    if not host.limits.max_history or not host.taps:
        return
    one_by_one = follow(host, ids, **values)
    for _ in range(9):
        step_on(host, [one_by_one])
    host.close(one_by_one.text)
    text, out, made = host.open(), list[Ticket](), blank(1)  # on the same slot
    for step in range(9):
        feed: dict[str, Any] = {"tokens": [-1]}
        if step == 0:
            feed = {"tokens": ids, "history": [(t, 0) for t in ids]}
        if len(out) == host.limits.depth:
            take(host.backend.collect(out.pop(0)), made)
        out.append(host.enqueue([(text, host.row(text, **feed, **values))]))
    for ticket in out:
        take(host.backend.collect(ticket), made)
    host.close(text)
    assert made == [one_by_one.made]
    again = follow(host, ids, made[0][:4], **values)  # as after a preemption
    for _ in range(5):
        step_on(host, [again])
    assert again.made == made[0][4:]
    late = host.step([(again.text, host.row(again.text, [-1]))])
    host.backend.sample(host.backend.forward(late))
    host.backend.collect(late.step)
    host.close(again.text)
    text = host.open()
    host.run([(text, host.row(text, ids))])
    late = host.step([(text, host.row(text, [-1], penalty=(1.0, 0.5, 0.0)))])
    refused(lambda: host.backend.forward(late), "sampling.penalty", [0])
    host.close(text)


def bias(open: Opener) -> None:
    """Bias moves, forces and bans tokens, drawn and greedy; a row between biased ones is free. As much as fits."""
    host, ids = open(), prompt(3, seed=2)
    if not host.limits.max_bias or not host.taps:
        return
    best = one(host, Ask(prompt=ids, make=1)).tokens[0]
    drawn: dict[str, Any] = {"temperature": 1.0, "seed": 6}
    many = [(t % SPEC.vocab, 0.01 * (t % 7) - 0.02) for t in range(host.limits.max_bias - 8)]
    rows = [
        follow(host, ids, bias=[(40, 4.0), (7, -1.0), (SPEC.vocab - 1, 3.5)], **drawn),
        follow(host, ids),
        follow(host, ids, bias=[(11, 1e30)]),
        follow(host, ids, bias=[(best, -1e30)]),
        follow(host, ids, bias=many, **drawn, top_p=0.9),
    ]
    for _ in range(6):
        step_on(host, rows)
    assert rows[2].made == [11] * 6
    assert best not in rows[3].made
    assert rows[1].made[0] == best
    for row in rows:
        host.close(row.text)


def together(open: Opener) -> None:
    """Everything at once, in one batch: penalties, bias, masks, temperature, filters; and nothing, in one row."""
    host, draw = open(), np.random.default_rng(7)
    if not (host.limits.max_history and host.limits.max_bias and host.limits.max_masks and host.taps):
        return
    for turn in range(6):
        rows = []
        for i in range(4):
            values: dict[str, Any] = {"temperature": float(draw.choice([0.0, 0.7, 1.5])), "seed": 10 * turn + i}
            values |= {"top_k": int(draw.choice([0, 3, 30])), "top_p": float(np.float32(draw.choice([0.6, 1.0])))}
            values["min_p"] = float(np.float32(draw.choice([0.0, 0.05])))
            if draw.random() < 0.7:
                values["penalty"] = tuple(draw.choice([0.5, 0.9, 1.2, 1.9], 3).tolist())
            if draw.random() < 0.7:
                values["bias"] = [(int(t), float(draw.normal(0, 2))) for t in draw.integers(0, SPEC.vocab, 5)]
            rows.append(follow(host, prompt(2, seed=turn + i), [5] * i if "penalty" in values else [], **values))
        rows.append(follow(host, prompt(2), temperature=1.0, seed=turn))
        for _ in range(5):
            few = [draw.random(SPEC.vocab) < 0.2 for _ in rows]
            for allowed in few:
                allowed[int(draw.integers(SPEC.vocab))] = True
            step_on(host, rows, [a if draw.random() < 0.6 else None for a in few])
        for row in rows:
            host.close(row.text)


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
