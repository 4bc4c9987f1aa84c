"""What came of a comparison: figures, which of them are past a threshold, and all of it as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from backends.api import ties
from radixmesh.parity.compare import Verdict, compare
from radixmesh.parity.metrics import KS, OVERLAP, Positions, Summary, buckets, measure, summarise
from radixmesh.parity.readings import Reading
from radixmesh.parity.routing import changed
from radixmesh.parity.subjects import Subject
from radixmesh.parity.thresholds import Thresholds


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What was fed. cut: ids that were left away at its end, where the model reaches no further."""

    name: str
    ids: tuple[int, ...]
    cut: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A figure and its threshold. least: it must be at least so large; otherwise at most."""

    metric: str
    value: float
    limit: float
    least: bool = False

    @property
    def ok(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit  # False for NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One subject against the judge. verdicts, positions: one a text; inner values are the first text's. made: greedy
    tokens. experts: layer's tap -> share of tokens that went to other experts, {} where nothing tells."""

    subject: Subject
    verdicts: tuple[Verdict, ...]
    positions: tuple[Positions, ...]
    summary: Summary
    buckets: tuple[Summary, ...]
    greedy: ties.Ties
    made: int
    experts: dict[str, float]
    pinned: bool
    checks: tuple[Check, ...]

    @property
    def first(self) -> str | None:
        """The first value out of tolerance, in the order of computation."""
        return next((v.first for v in self.verdicts if v.first is not None), None)

    @property
    def ok(self) -> bool:
        return self.first is None and all(c.ok for c in self.checks)


def assess(
    subject: Subject,
    limits: Thresholds,
    texts: Sequence[Text],
    judged: Sequence[Reading],
    readings: Sequence[Reading],
    free: Sequence[Reading] | None = None,
) -> Outcome:
    """judged: by the judge, with the subject's experts where they were pinned; free: without, where they were."""
    verdicts = tuple(compare(a, b, limits) for a, b in zip(judged, readings, strict=True))
    positions = tuple(
        measure(a.values["logits"], b.values["logits"], t.ids) for a, b, t in zip(judged, readings, texts, strict=True)
    )
    whole = summarise(positions)
    assert whole is not None
    worst = max(v.gaps[-1].worst for v in verdicts)
    alone = free or judged
    greedy = ties.judge([r.tokens for r in alone], [r.tokens for r in readings], [r.margins for r in alone], worst)
    experts: dict[str, list[float]] = {}
    for a, b in zip(alone, readings, strict=True):
        for name, share in changed(a.routing, b.routing).items():
            experts.setdefault(name, []).append(share)
    return Outcome(
        subject=subject,
        verdicts=verdicts,
        positions=positions,
        summary=whole,
        buckets=buckets(positions),
        greedy=greedy,
        made=sum(len(r.tokens) for r in readings),
        experts={name: sum(shares) / len(shares) for name, shares in experts.items()},
        pinned=free is not None,
        checks=checks(whole, limits) + _greedy(greedy, limits),
    )


def checks(s: Summary, limits: Thresholds) -> tuple[Check, ...]:
    """Figures of positions beside their thresholds."""
    found = [
        Check(metric="kl_mean", value=s.kl_mean, limit=limits.kl_mean),
        Check(metric="kl_p99", value=s.kl_p99, limit=limits.kl_p99),
        Check(metric="kl_max", value=s.kl_max, limit=limits.kl_max),
        Check(metric="top1", value=s.top1, limit=limits.top1, least=True),
        Check(metric="overlap", value=s.overlap[KS.index(OVERLAP)], limit=limits.overlap, least=True),
        Check(metric="flips", value=s.flips, limit=limits.flips),
    ]
    if s.perplexity is not None:
        off = abs(s.perplexity[1] / s.perplexity[0] - 1)
        found.append(Check(metric="perplexity", value=off, limit=limits.perplexity))
    return tuple(found)


def _greedy(greedy: ties.Ties, limits: Thresholds) -> tuple[Check, ...]:
    sequences = greedy.equal + greedy.near + len(greedy.faults)
    return (
        Check(metric="greedy_faults", value=len(greedy.faults), limit=0),
        Check(metric="greedy_near_ties", value=greedy.near, limit=math.ceil(limits.near * sequences)),
    )


def as_json(model: str, judge: Subject, texts: Sequence[Text], outcomes: Sequence[Outcome], made: int) -> Any:
    """The whole result; NaN and infinities as null."""
    return _finite(
        {
            "model": model,
            "judge": judge.name,
            "judge_dtype": judge.dtype,
            "prompts": [{"name": t.name, "tokens": len(t.ids), "cut": t.cut} for t in texts],
            "greedy_tokens": made,
            "top_k": list(KS),
            "ok": all(o.ok for o in outcomes),
            "subjects": [_subject(judge, o) for o in outcomes],
        }
    )


def _subject(judge: Subject, o: Outcome) -> dict[str, Any]:
    differs = [v.differs for v in o.verdicts]
    return {
        "name": o.subject.name,
        "backend": o.subject.backend,
        "dtype": o.subject.dtype,
        "mesh": str(o.subject.mesh),
        "ok": o.ok,
        "first": o.first,
        "gaps": [asdict(g) | {"ok": g.ok} for g in o.verdicts[0].gaps],
        "logits": [asdict(v.gaps[-1]) | {"ok": v.gaps[-1].ok} for v in o.verdicts],
        "checks": [asdict(c) | {"ok": c.ok} for c in o.checks],
        "summary": asdict(o.summary),
        "buckets": [asdict(b) for b in o.buckets],
        "greedy": {"equal": o.greedy.equal, "near": o.greedy.near, "faults": o.greedy.faults, "differs": differs},
        "experts_changed": o.experts,
        "experts_pinned": o.pinned,
        "kl": [p.kl.tolist() for p in o.positions],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
