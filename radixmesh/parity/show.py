"""A comparison as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from radixmesh.parity.metrics import KS, OVERLAP, Summary
from radixmesh.parity.report import Outcome, Text
from radixmesh.parity.subjects import Subject

PLAIN = 110
"""Columns where no terminal has a width."""


def show(model: str, judge: Subject, texts: Sequence[Text], outcomes: Sequence[Outcome]) -> None:
    """Values of the first text, one line each and one column a subject; then logits by bucket; then one line each."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN
    console.print(_values(model, judge, texts[0], outcomes))
    if len(texts) > 1:
        said = ", ".join(f"{t.name} {len(t.ids)}" + (f" (cut by {t.cut})" if t.cut else "") for t in texts)
        console.print(f"logits of {sum(len(t.ids) for t in texts)} tokens: {said}", markup=False)
    console.print(_logits(outcomes))
    for o in outcomes:
        where = "every value within tolerance" if o.first is None else f"first differs at {o.first}"
        bad = "; ".join(
            f"{c.metric} {c.value:.2g}, {'at least' if c.least else 'at most'} {c.limit:.2g}"
            for c in o.checks
            if not c.ok
        )
        parts = [where, _greedy(o), *([_experts(o)] if o.experts else []), *([bad] if bad else [])]
        console.print(f"{o.subject.name}: {'; '.join(parts)}: {'ok' if o.ok else 'NOT OK'}", markup=False)


def _values(model: str, judge: Subject, text: Text, outcomes: Sequence[Outcome]) -> Table:
    table = Table(title=f"{model}: {len(text.ids)} tokens, max |difference| from {judge.name}")
    table.add_column("value")
    for o in outcomes:
        table.add_column(o.subject.name, justify="right")
    table.add_column("allowed", justify="right")
    for i, gap in enumerate(outcomes[0].verdicts[0].gaps):
        found = [o.verdicts[0].gaps[i] for o in outcomes]
        cells = [f"{g.worst:.1e}" + ("" if g.ok else " !") for g in found]
        table.add_row(gap.name, *cells, " ".join(dict.fromkeys(f"{g.allowed:.1e}" for g in found)))
    return table


def _logits(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("subject", "positions", "count", "max |diff|", "KL mean", "p99", "max", "top-1", f"top-{OVERLAP}"):
        table.add_column(name, justify="left" if name in ("subject", "positions") else "right", no_wrap=True)
    table.add_column("perplexity", justify="right", no_wrap=True)
    table.add_column("off by", justify="right", no_wrap=True)
    for o in outcomes:
        for i, s in enumerate((*o.buckets, o.summary)):
            last = i == len(o.buckets)
            table.add_row(o.subject.name if i == 0 else "", "all" if last else span(s), *_cells(s))
    return table


def _cells(s: Summary) -> list[str]:
    kl = [f"{x:.1e}" for x in (s.kl_mean, s.kl_p99, s.kl_max)]
    best = [f"{x:.2%}" for x in (s.top1, s.overlap[KS.index(OVERLAP)])]
    both = ["", ""]
    if s.perplexity is not None:
        both = [f"{s.perplexity[0]:.4g}", f"{s.perplexity[1] / s.perplexity[0] - 1:+.0e}"]
    return [str(s.count), f"{s.gap:.1e}", *kl, *best, *both]


def span(s: Summary) -> str:
    """A bucket's positions, such as 128-511."""
    return f"{s.first}-{'' if s.last is None else s.last}"


def _greedy(o: Outcome) -> str:
    if not o.greedy.faults and not o.greedy.near:
        return f"{o.made} greedy tokens equal"
    parts = [f"greedy tokens of text {i} differ from {at} on" for i, at in o.greedy.faults]
    if o.greedy.near:
        parts.append(f"{o.greedy.near} of {len(o.verdicts)} greedy texts part at a near-tie")
    return "; ".join(parts)


def _experts(o: Outcome) -> str:
    share = sum(o.experts.values()) / len(o.experts)
    return f"{share:.2%} of tokens changed experts" + (" (the judge's are pinned)" if o.pinned else "")
