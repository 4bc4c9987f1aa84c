"""Checks: logprobs of tokens and of prompts are the log-softmax of the logits that the backend itself had."""

from __future__ import annotations

from typing import Any

import numpy as np

from backends.api.choice import score
from backends.api.conformance.bench import SPEC, Opener, prompt
from backends.api.step import F32, I32, Logprobs

NEAR = 2e-5
"""What float32 may lose in a log-softmax over a small vocabulary."""


def _same(found: Logprobs | None, logits: F32, tokens: I32, alternatives: int) -> None:
    """Assert that logprobs are those of tokens int32[N] by logits float32[N, V]."""
    assert found is not None
    want = score(logits, tokens, alternatives)
    assert found.own.shape == want.own.shape
    assert found.ids.shape == found.top.shape == want.ids.shape
    assert [x.dtype.name for x in (found.own, found.ids, found.top)] == ["float32", "int32", "float32"]
    assert np.array_equal(found.ids, want.ids), f"{found.ids} are not the likeliest, {want.ids}"
    for a, b in ((found.own, want.own), (found.top, want.top)):
        assert np.abs(a - b).max(initial=0.0) <= NEAR * np.maximum(1, np.abs(b)).max(initial=1.0)


def logprobs(open: Opener) -> None:
    """Of the tokens made, by the raw logits, whatever was done to them since; with as many alternatives as each row
    asks, none included; in chunks that make no token there are none of them."""
    host, most = open(), open().limits.max_logprobs
    if not most or not host.taps:
        return
    asked = [most, -1, 0, 3]
    values: list[dict[str, Any]] = [{}, {}, {"temperature": 1.5, "seed": 4}, {"temperature": 1.0, "seed": 2}]
    if host.limits.max_bias:
        values[3]["bias"] = [(t, 5.0) for t in range(4)]
    texts = [host.open() for _ in asked]
    feed = [prompt(2 + i, seed=i) for i in range(4)]
    for step in range(4):
        rows = [
            (text, host.row(text, ids if step == 0 else [-1], output=int(step > 0 or i != 2), logprobs=k, **more))
            for i, (text, ids, k, more) in enumerate(zip(texts, feed, asked, values, strict=True))
        ]
        if step == 1:  # the third ends its prompt only now
            rows[2] = (texts[2], host.row(texts[2], [4, 5], logprobs=asked[2], **values[2]))
            texts[2].upper -= 1
        if step % 2:
            rows.reverse()
        result = host.run(rows)
        assert result.prompt_logprobs is None
        assert result.logprobs is not None
        last = np.cumsum([len(row.tokens) for _, row in rows]) - 1
        for r, (_, row) in enumerate(rows):
            if row.logprobs < 0:
                assert result.logprobs[r] is None
            else:
                n = int(result.counts[r])
                _same(result.logprobs[r], result.taps["logits"][last[r]][None][:n], result.tokens[r, :n], row.logprobs)
    result = host.run([(texts[1], host.row(texts[1], [-1]))])
    assert result.logprobs is None
    for text in texts:
        host.close(text)


def prompts(open: Opener) -> None:
    """Every token of a prompt from the first position on is scored once, by the row that feeds the one before it, in
    chunks of any size and beside other rows; rows that go on to make tokens score nothing more."""
    host, most = open(), open().limits.max_logprobs
    if not most or not host.taps:
        return
    ids, other = prompt(14, seed=4), prompt(9, seed=5)
    for first, k, chunk in ((1, 2, 14), (1, most, 5), (6, 0, 4), (13, 1, 3), (14, 1, 14), (1, 1, 1)):
        texts = [host.open(), host.open()]
        own, top, seen = list[F32](), list[I32](), list[F32]()
        for at in range(0, len(ids) + 2 * chunk, chunk):
            part = ids[at : at + chunk]
            ends = at + chunk >= len(ids)
            following = -1 if ends else ids[at + chunk]
            row = host.row(
                texts[0], part or [-1], next=following, output=int(ends), prompt_logprobs=(first, k), logprobs=0
            )
            beside = host.row(texts[1], other[:2] if at == 0 else [-1])
            rows = [(texts[1], beside), (texts[0], row)]
            result = host.run(rows if at % 2 else rows[::-1])
            r = int(at % 2)
            assert result.prompt_logprobs is not None
            assert result.prompt_logprobs[1 - r] is None
            found = result.prompt_logprobs[r]
            assert found is not None
            if part:
                begin = len(beside.tokens) if r else 0
                seen.append(result.taps["logits"][begin : begin + len(part)])
            else:
                assert len(found.own) == 0
            assert found.ids.shape == (len(found.own), k)
            own.append(found.own)
            top.append(found.ids)
        logits = np.concatenate(seen)[first - 1 : -1]
        want = score(logits, np.array(ids[first:], np.int32), k)
        assert np.concatenate(own).shape == want.own.shape, f"first {first}, chunks of {chunk}"
        assert np.abs(np.concatenate(own) - want.own).max(initial=0.0) <= NEAR * 10
        assert np.array_equal(np.concatenate(top), want.ids)
        for text in texts:
            host.close(text)
    _seated_later(open)


def _seated_later(open: Opener) -> None:
    """A slot seated on a prefix scores from its first fed token's successor on."""
    host, ids = open(), prompt(12, seed=6)
    root = host.open()
    host.run([(root, host.row(root, ids))])
    text = host.open(root, 8)
    result = host.run([(text, host.row(text, ids[8:], prompt_logprobs=(9, 2)))])
    assert result.prompt_logprobs is not None
    _same(result.prompt_logprobs[0], result.taps["logits"][:3], np.array(ids[9:], np.int32), 2)
    for each in (text, root):
        host.close(each)
    assert SPEC.vocab > host.limits.max_logprobs
