"""A report as one HTML page: no script, no file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from radixmesh.pages.frame import document
from radixmesh.pages.plot import Axis, Series, bars, legend, lines, log_axis

POINTS = 240
"""Points of a curve over positions; each is the mean of its share of them."""
METRICS = {
    "kl_mean": "KL, mean",
    "kl_p99": "KL, 99th percentile",
    "kl_max": "KL, largest",
    "top1": "same best token",
    "overlap": "overlap of the ten best",
    "flips": "other best token, no near-tie",
    "perplexity": "perplexity, relative difference",
    "greedy_faults": "greedy texts that part",
    "greedy_near_ties": "greedy texts that part at a near-tie",
}


def make(report: dict[str, Any]) -> str:
    """The page of a report, as report.as_json makes it."""
    verdict = "agree" if report["ok"] else "differ"
    prompts = ", ".join(
        f"{escape(p['name'])} ({p['tokens']} tokens{', cut' if p['cut'] else ''})" for p in report["prompts"]
    )
    sections = [
        ("Thresholds", "Every figure over all positions, and what it may be.", _checks(report)),
        (
            "Layer by layer",
            f"Largest difference of each inner value from {escape(report['judge'])}, in the order of computation; "
            "dashed: what is allowed.",
            _layers(report),
        ),
        (
            "KL by position",
            f"KL({escape(report['judge'])} || subject) in nats along {escape(_longest(report)['name'])}.",
            _positions(report),
        ),
        ("By context", "Mean KL of the positions of each bucket.", _buckets(report)),
        ("Best tokens", "Share of the judge's k best tokens that are among the subject's k best.", _overlap(report)),
    ]
    intro = (
        f"Judge: <b>{escape(report['judge'])}</b> in {escape(report['judge_dtype'])}. Fed: {prompts}; "
        f"{report['greedy_tokens']} greedy tokens after each."
    )
    return document("parity", report["model"], (verdict, report["ok"]), intro, sections, report["made"])


def _checks(report: dict[str, Any]) -> str:
    subjects = report["subjects"]
    head = "".join(f"<th>{escape(s['name'])}</th>" for s in subjects)
    rows = [_row("first value out of tolerance", [(s["first"] or "none", s["first"] is None, "") for s in subjects])]
    known = [c["metric"] for c in subjects[0]["checks"]]
    for metric in known:
        found = [next(c for c in s["checks"] if c["metric"] == metric) for s in subjects]
        cells = [(_number(c["value"]), c["ok"], f"{'≥' if c['least'] else '≤'} {_number(c['limit'])}") for c in found]
        rows.append(_row(METRICS[metric], cells))
    both = [s["summary"]["perplexity"] for s in subjects]
    if all(both):
        rows.append(
            _row("perplexity, judge and subject", [(f"{_number(p[0], 6)}, {_number(p[1], 6)}", True, "") for p in both])
        )
    told = [s["experts_changed"] for s in subjects]
    if any(told):
        means = [f"{sum(t.values()) / len(t):.2%}" if t else "not told" for t in told]
        rows.append(_row("tokens that changed experts, mean of layers", [(m, True, "") for m in means]))
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _row(name: str, cells: Sequence[tuple[str, bool, str]]) -> str:
    inner = "".join(
        f'<td class="{"ok" if ok else "bad"}">{escape(value)}<small>{escape(limit)}</small></td>'
        for value, ok, limit in cells
    )
    return f"<tr><th>{escape(name)}</th>{inner}</tr>"


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "not a number"
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.{digits}g}"


def _layers(report: dict[str, Any]) -> str:
    series, names = [], [g["name"] for g in report["subjects"][0]["gaps"]]
    for i, s in enumerate(report["subjects"]):
        series.append(Series(name=s["name"], values=[g["worst"] for g in s["gaps"]], color=i))
    allowed: list[list[float]] = []
    for i, s in enumerate(report["subjects"]):
        values = [g["allowed"] for g in s["gaps"]]
        if values not in allowed:
            allowed.append(values)
            name = "allowed" if _alike(report) else f"allowed, {s['name']}"
            series.append(Series(name=name, values=values, color=i, limit=True))
    axis = log_axis([v for s in series for v in s.values])
    return lines(series, [n.replace("layers.", "") for n in names], axis, "error by layer", dots=True) + legend(series)


def _alike(report: dict[str, Any]) -> bool:
    return len({tuple(g["allowed"] for g in s["gaps"]) for s in report["subjects"]}) == 1


def _longest(report: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = max(report["prompts"], key=lambda p: p["tokens"])
    return found


def _positions(report: dict[str, Any]) -> str:
    at = report["prompts"].index(_longest(report))
    count = report["prompts"][at]["tokens"]
    size = max(1, -(-count // POINTS))
    labels = [str(i) for i in range(0, count, size)]
    series = [
        Series(name=s["name"], values=[_mean(s["kl"][at][i : i + size]) for i in range(0, count, size)], color=n)
        for n, s in enumerate(report["subjects"])
    ]
    return lines(series, labels, log_axis([v for s in series for v in s.values]), "KL by position") + legend(series)


def _mean(values: Sequence[float | None]) -> float | None:
    """KL is not negative but for rounding."""
    found = [max(v, 0.0) for v in values if v is not None]
    return sum(found) / len(found) if found else None


def _buckets(report: dict[str, Any]) -> str:
    spans = [f"{b['first']}-{'' if b['last'] is None else b['last']}" for b in report["subjects"][0]["buckets"]]
    series = [
        Series(name=s["name"], values=[b["kl_mean"] for b in s["buckets"]], color=i)
        for i, s in enumerate(report["subjects"])
    ]
    return bars(series, spans, log_axis([v for s in series for v in s.values]), "KL by context") + legend(series)


def _overlap(report: dict[str, Any]) -> str:
    series = [
        Series(name=s["name"], values=[100 * x for x in s["summary"]["overlap"]], color=i)
        for i, s in enumerate(report["subjects"])
    ]
    least = min(v for s in series for v in s.values if v is not None)
    low = 0.0 if least < 50 else 50.0 if least < 90 else 90.0 if least < 99 else 99.0
    labels = [f"k = {k}" for k in report["top_k"]]
    return bars(series, labels, Axis(low=low, high=100.0, log=False), "overlap", ".2f") + legend(series)
