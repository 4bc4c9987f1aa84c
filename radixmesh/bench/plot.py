"""Figures of a benchmark as a page of charts, or as charts alone in one SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

from engine.errors import ConfigError
from radixmesh.pages.frame import document
from radixmesh.pages.plot import Axis, Series, bars, legend, lines, log_axis, stacked

Chart: TypeAlias = tuple[str, str, Sequence[Series]]
"""Title, SVG, what its colours mean."""
Figures: TypeAlias = Sequence[Mapping[str, Any]]
KINDS = (".html", ".svg")


def check(path: Path | None) -> None:
    """Raise ConfigError for a file that would be neither, before anything is measured."""
    if path is not None and path.suffix not in KINDS:
        raise ConfigError(f"plot: {path}: end it with {' or '.join(KINDS)}", field="plot")


def draw(path: Path, record: Mapping[str, Any]) -> None:
    """record: as radixmesh.bench.record.write writes it, of one of CHARTS."""
    charts = CHARTS[record["benchmark"]](record["figures"])
    if path.suffix == ".svg":
        text = stacked(charts)
    else:
        sections = [(escape(title), "", svg + legend(series)) for title, svg, series in charts]
        sections.append(("Figures", "", _table(record["figures"])))
        made = {k: record[k] for k in ("command", "commit", "machine", "versions")}
        text = document("bench", f"bench {record['benchmark']}", ("measured", True), "", sections, made)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _table(figures: Figures) -> str:
    """Every number and word of the figures."""
    names = list(dict.fromkeys(k for f in figures for k, v in f.items() if isinstance(v, str | int | float)))
    head = "".join(f"<th>{escape(n)}</th>" for n in names)
    rows = ("".join(f"<td>{escape(_cell(f.get(n)))}</td>" for n in names) for f in figures)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _bars(title: str, labels: Sequence[str], columns: Mapping[str, Sequence[float | None]], log: bool = False) -> Chart:
    """A group for each label, a bar for each column."""
    series = [Series(name=name, values=values, color=i) for i, (name, values) in enumerate(columns.items())]
    every = [v for s in series for v in s.values]
    axis = log_axis(every) if log else Axis(low=0.0, high=max((v or 0.0 for v in every), default=1.0) or 1.0, log=False)
    return title, bars(series, labels, axis, title, ".3g"), series


def _workloads(figures: Figures) -> list[Chart]:
    names = [f"{f['workload']}, {f['subject']}" for f in figures]
    charts = [
        _bars("seconds", names, {"whole workload": [f["seconds"] for f in figures]}),
        _bars("output tokens a second", names, {"tokens/s": [f["output_tokens_per_second"] for f in figures]}, True),
    ]
    alone = [f for f in figures if "ms_per_token" in f]
    if alone:
        labels = [f"{f['workload']}, {f['subject']}" for f in alone]
        charts.append(_bars("ms a token", labels, {"ms": [f["ms_per_token"] for f in alone]}))
    return charts


def _offline(figures: Figures) -> list[Chart]:
    subjects, batches = (list(dict.fromkeys(f[k] for f in figures)) for k in ("subject", "batch"))
    of = {(f["subject"], f["batch"]): f for f in figures}

    def column(batch: int, name: str) -> list[float | None]:
        return [of[s, batch][name] if (s, batch) in of else None for s in subjects]

    return [
        _bars(title, subjects, {f"batch {b}": column(b, name) for b in batches})
        for name, title in (("decode", "decoded tokens a second"), ("first", "seconds until the first token"))
    ]


def _latency(figures: Figures) -> list[Chart]:
    charts = []
    for name in dict.fromkeys(f["workload"] for f in figures):
        some = [f for f in figures if f["workload"] == name]
        for what, title in (("ttft", "until the first token"), ("itl", "between tokens"), ("e2e", "until the last")):
            series = [
                Series(name=p, values=[1e3 * f[what][p] if what in f else None for f in some], color=i)
                for i, p in enumerate(("p50", "p90", "p99"))
            ]
            axis = log_axis([v for s in series for v in s.values])
            head = f"{name}: ms {title}"
            charts.append((head, lines(series, [f["load"] for f in some], axis, head, dots=True), series))
    return charts


def _kernels(figures: Figures) -> list[Chart]:
    """Of a GPU milliseconds, by the first word of the case; of TPUs cycles beside what can't be gone below."""
    if any("chip" in f for f in figures):
        some = [f for f in figures if "schedule_cycles" in f]
        columns = {n: [f.get(n) for f in some] for n in ("schedule_cycles", "roofline_cycles")}
        return [_bars("cycles", [f"{f['case']} {f['chip']}" for f in some], columns, True)]
    charts = []
    timed = [f for f in figures if any(k.endswith("ms") for k in f)]
    for kind in dict.fromkeys(f["case"].split()[0] for f in timed):
        some = [f for f in timed if f["case"].split()[0] == kind]
        names = list(dict.fromkeys(k for f in some for k in f if k.endswith("ms")))
        labels = [f["case"].removeprefix(kind).strip() for f in some]
        charts.append(_bars(f"{kind}, ms", labels, {n: [f.get(n) for f in some] for n in names}, True))
    return charts


CHARTS: Mapping[str, Callable[[Figures], list[Chart]]] = {
    "workloads": _workloads,
    "offline": _offline,
    "latency": _latency,
    "kernels": _kernels,
}
"""By the name of the benchmark."""
