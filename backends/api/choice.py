"""How a token is chosen from logits: the normative order, in plain numpy with a sort. Every backend is held to it.

Order: repetition, presence and frequency penalties, bias, mask, temperature, top-k, top-p on what is left renormalised,
min-p, then Gumbel noise and the largest, ties to the lowest id. Temperature 0 stops after the mask.

Ties at the edge of a filter are kept, so that no filter depends on an order of equal values: top-k keeps every token
whose value is at least the k-th largest; top-p keeps every token at least as probable as the last token needed to reach
top_p of the mass that top-k left; min-p keeps p >= min_p * max(p).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from backends.api.random import gumbel
from backends.api.step import F32, I32, U32, Bool, Logprobs, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one row asks of the sampler, and what it has seen so far; None = none of it.

    penalty: repetition, presence, frequency. seen bool[V]: tokens in the prompt or in the output. made int32[V]: times
    each token was put out. bias float32[V]: added. allowed bool[V]: the vocabulary mask.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    penalty: tuple[float, float, float] = (1.0, 0.0, 0.0)
    seen: Bool | None = None
    made: I32 | None = None
    bias: F32 | None = None
    allowed: Bool | None = None

    @classmethod
    def of(
        cls,
        sampling: Sampling,
        row: int,
        *,
        seen: Bool | None = None,
        made: I32 | None = None,
        bias: F32 | None = None,
        allowed: Bool | None = None,
    ) -> Choice:
        """Row `row` of a step's sampling."""
        repetition, presence, frequency = sampling.penalty[row].tolist()
        return cls(
            temperature=float(sampling.temperature[row]),
            top_k=int(sampling.top_k[row]),
            top_p=float(sampling.top_p[row]),
            min_p=float(sampling.min_p[row]),
            seed=int(sampling.seed[row]),
            penalty=(repetition, presence, frequency),
            seen=seen,
            made=made,
            bias=bias,
            allowed=allowed,
        )


def choose(logits: F32, choice: Choice, position: int) -> int:
    """The token that logits float32[V] give at `position`, the absolute position of the token made."""
    return int(np.argmax(scores(logits, choice, position)))


def scores(logits: F32, choice: Choice, position: int) -> F32:
    """float32[V] whose largest is chosen: noise included, -inf for a token that the mask or a filter took out."""
    return scored(scaled(logits, choice), choice, position)


def scored(values: F32, choice: Choice, position: int, slack: float = 0.0) -> F32:
    """`scores` of values that are scaled already, with the filters `slack` wider (below 0: tighter)."""
    if choice.temperature == 0:
        return values
    noise = gumbel(np.array([choice.seed], np.uint64), np.array([position], np.int32), len(values))[0]
    return np.where(kept(values, choice, slack), values + noise, np.float32(-np.inf)).astype(np.float32)


def scaled(logits: F32, choice: Choice) -> F32:
    """Logits after penalties, bias, mask and temperature. float32[V].

    A temperature divides the distance to the largest, so that none is too small for float32.
    """
    x = np.array(logits, np.float32)
    repetition, presence, frequency = (np.float32(p) for p in choice.penalty)
    if choice.seen is not None:
        x = np.where(choice.seen, np.where(x > 0, x / repetition, x * repetition), x)
    if choice.made is not None:
        x = x - presence * (choice.made > 0) - frequency * choice.made.astype(np.float32)
    if choice.bias is not None:
        x = x + choice.bias
    if choice.allowed is not None:
        x = np.where(choice.allowed, x, np.float32(-np.inf))
    x = x.astype(np.float32)
    if choice.temperature == 0:
        return x
    with np.errstate(over="ignore"):  # to -inf, which is right
        cool: F32 = (x - x.max()) / np.float32(choice.temperature)
    return cool


def kept(values: F32, choice: Choice, slack: float = 0.0) -> Bool:
    """Which tokens the filters leave. values float32[V]: scaled. bool[V].

    slack: how far each value may be off. Above 0 every token is kept that could be kept then, below 0 only those that
    must be; the comparison of two backends needs both.
    """
    best: Bool = values == values.max()  # whatever the slack
    keep: Bool = np.ones(len(values), bool)
    if 0 < choice.top_k < len(values):
        keep = (values >= np.sort(values)[-choice.top_k] - 2 * slack) | best
    p = np.where(keep, np.exp(values.astype(np.float64) - values.max()), 0.0)
    p /= p.sum()
    give = np.exp(-2 * slack)
    if choice.top_p < 1:
        order = np.sort(p)[::-1]
        needed = np.searchsorted(np.cumsum(order), min(max(choice.top_p + slack, 0.0), 1.0))
        keep &= p >= order[min(int(needed), len(order) - 1)] * give
    if choice.min_p > 0:
        keep &= p >= choice.min_p * p.max() * give
    return keep | best


def unpack(mask: U32, vocab: int) -> Bool:
    """A vocabulary mask uint32[ceil(V/32)] -> bool[V]; bit v % 32 of word v // 32 allows v."""
    words = np.asarray(mask, "<u4")
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:vocab].astype(bool)


def score(logits: F32, tokens: I32, alternatives: int) -> Logprobs:
    """Logprobs of tokens int32[N] by logits float32[N, V], and of the likeliest."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :alternatives]
    rows = np.arange(len(tokens))
    own, top = x[rows, tokens], x[rows[:, None], ids]
    return Logprobs(own=own.astype(np.float32), ids=ids.astype(np.int32), top=top.astype(np.float32))
