"""Logits of one text from two subjects, position by position: KL, the best tokens, what each makes of the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from backends.api.step import F32
from backends.api.ties import near_tie

F64: TypeAlias = NDArray[np.float64]

KS = (1, 5, 10, 25)
"""How many best tokens are compared."""
OVERLAP = 10
"""Of KS, the one that has a threshold."""
EDGES = (0, 128, 512, 2048, 8192, 32768, 131072)
"""First position of each bucket of context."""
BLOCK = 256
"""Positions that are computed at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """One entry a position of a text, T of them, all float64 but `same` (bool).

    kl: KL(judge || subject), nats. gap: max |logit difference|. margin: between the judge's two best, in logits. same:
    whether the best token is the same. overlap [T, len(KS)]: share of the judge's k best that are among the subject's
    k best. nll [T - 1, 2]: minus log probability of the token that follows, by judge and subject.
    """

    kl: F64
    gap: F64
    margin: F64
    same: NDArray[np.bool_]
    overlap: F64
    nll: F64


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Positions taken together. first, last: of the bucket (last = None: open), or all. flips: share of positions whose
    best token differs though the judge's margin is no near-tie. perplexity: of judge and subject; None without a next
    token."""

    first: int
    last: int | None
    count: int
    gap: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    near: float
    flips: float
    overlap: tuple[float, ...]
    perplexity: tuple[float, float] | None


def measure(judge: F32, subject: F32, tokens: Sequence[int]) -> Positions:
    """judge, subject: logits float32[T, V] of the same tokens int[T]."""
    parts = [
        _measure(judge[i : i + BLOCK], subject[i : i + BLOCK], tokens[i + 1 : i + 1 + BLOCK])
        for i in range(0, len(judge), BLOCK)
    ]
    return Positions(**{name: np.concatenate([p[name] for p in parts]) for name in parts[0]})


def _measure(judge: F32, subject: F32, following: Sequence[int]) -> dict[str, Any]:
    a, b = judge.astype(np.float64), subject.astype(np.float64)
    logp, logq = log_softmax(a), log_softmax(b)
    most = min(max(KS), a.shape[1])
    left, right = (best(x, most) for x in (a, b))
    overlap = [
        [len(set(p[:k].tolist()) & set(q[:k].tolist())) / min(k, most) for k in KS]
        for p, q in zip(left, right, strict=True)
    ]
    rows, ids = np.arange(len(following)), np.asarray(following, np.int64)
    two = np.take_along_axis(a, left[:, :2], 1)
    return {
        "kl": (np.exp(logp) * (logp - logq)).sum(-1),
        "gap": np.abs(a - b).max(-1),
        "margin": two[:, 0] - two[:, -1],
        "same": left[:, 0] == right[:, 0],
        "overlap": np.array(overlap),
        "nll": -np.stack([logp[rows, ids], logq[rows, ids]], 1),
    }


def log_softmax(x: F64) -> F64:
    """Over the last dimension."""
    x = x - x.max(-1, keepdims=True)
    out: F64 = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return out


def best(x: F64, k: int) -> NDArray[np.int64]:
    """The k largest of each row, largest first, ties to the lowest id: int64[T, k]."""
    if k >= x.shape[1]:
        return np.argsort(-x, -1, kind="stable")
    # all that are as large as the k-th, so that a tie at the edge is decided by id
    found = np.argpartition(-x, k - 1, -1)[:, :k]
    edge = np.take_along_axis(x, found, -1).min(-1)
    for row in np.flatnonzero((x >= edge[:, None]).sum(-1) > k):
        found[row] = np.flatnonzero(x[row] >= edge[row])[np.argsort(-x[row][x[row] >= edge[row]], kind="stable")][:k]
    found = np.sort(found, -1)
    return np.take_along_axis(found, np.argsort(-np.take_along_axis(x, found, -1), -1, kind="stable"), -1)


def typical(texts: Sequence[Positions]) -> float:
    """The usual logit difference: median over all positions of their largest. What a near-tie is measured by: the
    difference at the flip itself would excuse every flip, since it must be half the margin at least."""
    return float(np.median(np.concatenate([t.gap for t in texts])))


def summarise(texts: Sequence[Positions], first: int = 0, last: int | None = None) -> Summary | None:
    """Positions first..last of all texts (last included; None: to the end). None where there are none."""
    cut = slice(first, None if last is None else last + 1)
    kl, gap, margin, same, overlap, nll = (
        np.concatenate([getattr(t, name)[cut] for t in texts])
        for name in ("kl", "gap", "margin", "same", "overlap", "nll")
    )
    if not len(kl):
        return None
    usual = typical(texts)
    tied = np.array([near_tie(m, usual) for m in margin])
    return Summary(
        first=first,
        last=last,
        count=len(kl),
        gap=float(gap.max()),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1=float(same.mean()),
        near=float((~same & tied).mean()),
        flips=float((~same & ~tied).mean()),
        overlap=tuple(float(x) for x in overlap.mean(0)),
        perplexity=(float(np.exp(nll[:, 0].mean())), float(np.exp(nll[:, 1].mean()))) if len(nll) else None,
    )


def buckets(texts: Sequence[Positions]) -> tuple[Summary, ...]:
    """A summary for each bucket of EDGES that has positions."""
    ends = [*(edge - 1 for edge in EDGES[1:]), None]
    found = (summarise(texts, first, last) for first, last in zip(EDGES, ends, strict=True))
    return tuple(s for s in found if s is not None)
