"""A report of targets as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from radixmesh.compile import gpu
from radixmesh.compile.gates import size
from radixmesh.compile.report import UNCOUNTED
from radixmesh.compile.show import row
from radixmesh.pages.frame import document
from radixmesh.pages.plot import Axis, Series, bars, legend, lines, log_axis

HEAD = ("program", "compiled in", "temporaries", "code", "peak", "step", "sampling", "roofline", "collectives")
LONG = 24
"""Letters of a cell that may be broken into lines."""


def make(reports: Sequence[Mapping[str, Any]], made: dict[str, Any]) -> str:
    """The page of one target or more."""
    whole, ok, several = [r for r in reports if "refused" not in r], all(r["ok"] for r in reports), len(reports) > 1
    first = whole[0]
    sections = [("Targets", "What fits, and what a step of the most rows is estimated to take.", _matrix(reports))]
    sections = sections if several else []
    for r in whole:
        at = f"{escape(r['target'])}: " if several else ""
        if "kernels" in r:
            sections.append((f"{at}kernels", "Of Triton: what the compiler says of each.", _kernels(r)))
            continue
        sections += [
            (f"{at}memory", "Of one device, with the temporaries of the largest program.", _memory(r)),
            (f"{at}programs", f"{escape(UNCOUNTED[0].upper() + UNCOUNTED[1:])}.", _programs(r)),
            (f"{at}gates", "What may not go out is red.", _gates(r)),
        ]
        if any("estimate" in p for p in r["programs"]):
            sections.append((f"{at}step times", "Milliseconds, by the size of the step.", _times(r)))
    intro = (
        f"{escape(first['family'])}, {escape(first['dtype'])}, compiled for "
        f"<b>{escape(', '.join(r['target'] for r in reports))}</b> without that hardware"
        + next((f"; rows that each see {r['context']} positions" for r in whole if "context" in r), "")
        + "."
    )
    return document("compile", first["model"], ("passes" if ok else "fails", ok), intro, sections, made)


def table(head: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Cells are (text, class); the first of a row is its heading."""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join(
        "<tr>"
        + f"<th>{escape(cells[0][0])}</th>"
        + "".join(
            f'<td class="{kind}{" text" if len(text) > LONG else ""}">{escape(text)}</td>' for text, kind in cells[1:]
        )
        + "</tr>"
        for cells in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _plain(cells: Sequence[str]) -> list[tuple[str, str]]:
    return [(c, "") for c in cells]


def _memory(r: Mapping[str, Any]) -> str:
    temp = max((p.get("temp", 0) for p in r["programs"]), default=0)
    code = sum(p.get("code", 0) for p in r["programs"])
    parts = {**r["held"], "temporaries": temp, "code": code}
    if r["memory"]:
        parts["free"] = max(0, r["memory"] - sum(parts.values()))
    said = table(("", "on one device"), [_plain((name, size(n))) for name, n in parts.items()])
    top = max(parts.values()) / (1 << 30)
    chart = bars(
        [Series(name="GiB", values=[n / (1 << 30) for n in parts.values()])],
        list(parts),
        Axis(low=0.0, high=top * 1.1 or 1.0, log=False),
        "memory",
        ".2f",
    )
    return f"{chart}{said}<p>{r['kv_tokens']} tokens fit the cache.</p>"


def _programs(r: Mapping[str, Any]) -> str:
    return table(HEAD, [_plain(row(p, r, True)) for p in r["programs"]])


def _kernels(r: Mapping[str, Any]) -> str:
    plain = "".join(
        f"<p>{escape(layer['layer'])}: plain torch, {escape(layer['plain'])}</p>"
        for layer in r["layers"]
        if layer["plain"]
    )
    return plain + table(("kernel", *gpu.FIELDS), [_plain(gpu.row(k)) for k in r["kernels"]])


def _gates(r: Mapping[str, Any]) -> str:
    cells = [
        [(f"{g['program']}: {g['name']}", ""), (g["found"], "ok" if g["ok"] else "bad"), (g["limit"], "")]
        for g in r["gates"]
    ]
    return table(("gate", "found", "limit"), cells)


def _times(r: Mapping[str, Any]) -> str:
    steps = sorted((p for p in r["programs"] if "estimate" in p), key=lambda p: p["tokens"])
    names = {"ms": "estimated, greedy", "sampled_ms": "with top-p and top-k", "roofline_ms": "roofline"}
    series = [
        Series(name=said, values=[p["estimate"][key] for p in steps], color=i)
        for i, (key, said) in enumerate(names.items())
    ]
    axis = log_axis([v for s in series for v in s.values])
    labels = [f"{p['tokens']} tokens" for p in steps]
    return bars(series, labels, axis, "step times", ".2f") + legend(series)


def _matrix(reports: Sequence[Mapping[str, Any]]) -> str:
    return table(MATRIX, [[(c, "") for c in summary(r)[:-1]] + [_verdict(r)] for r in reports])


def _verdict(r: Mapping[str, Any]) -> tuple[str, str]:
    return summary(r)[-1], "ok" if r["ok"] else "bad"


MATRIX = (
    "target",
    "mesh",
    "weights",
    "cache",
    "KV tokens",
    "programs",
    "compiled in",
    "decode step",
    "roofline",
    "gates",
)


def summary(r: Mapping[str, Any]) -> list[str]:
    """A report as one row of the matrix of targets."""
    if "refused" in r:
        return [r["target"], *[""] * (len(MATRIX) - 2), r["refused"]]
    if "kernels" in r:
        good = [k for k in r["kernels"] if "error" not in k]
        failed = len(r["kernels"]) - len(good)
        count = f"{len(good)} of {len(r['kernels'])} kernels"
        seconds = f"{sum(k['compile_s'] for k in good):.0f} s"
        return [r["target"], r["mesh"], "", "", "", count, seconds, "", "", f"{failed} failed" if failed else "pass"]
    made = [p for p in r["programs"] if "error" not in p]
    decode = next((p for p in sorted(made, key=lambda p: p["tokens"]) if p["rows"] >= r["max_rows"]), None)
    e = (decode or {}).get("estimate") or r["unrolled"]
    failed = sum(not g["ok"] for g in r["gates"])
    return [
        r["target"],
        r["mesh"],
        size(r["held"]["weights"]),
        size(r["held"]["cache"]),
        str(r["kv_tokens"]),
        f"{len(made)} of {len(r['programs'])}",
        f"{sum(p['seconds'] for p in r['programs']):.0f} s",
        f"{e['ms']:.2f} ms" if e else "",
        f"{e['roofline_ms']:.2f} ms" if e else "",
        f"{failed} failed" if failed else "pass",
    ]


def make_plan(report: Mapping[str, Any]) -> str:
    """The page of `radixmesh plan`."""
    found = report["options"]
    fit = [o for o in found if not o["refused"]]
    head = ("mesh", "on", "weights", "KV tokens", "rows", "step of 1", "of all rows", "tokens/s")
    rows = [
        _plain(
            [
                *(o["mesh"], o["target"], size(o["weights"]), str(o["kv_tokens"]), str(o["rows"])),
                *(f"{o['one_ms']:.2f} ms", f"{o['many_ms']:.2f} ms", f"{o['rate']:,.0f}"),
            ]
        )
        for o in fit
    ]
    labels = [o["mesh"] for o in fit]
    times = [
        Series(name="a step of one row", values=[o["one_ms"] for o in fit], color=0),
        Series(name="a step of all rows", values=[o["many_ms"] for o in fit], color=1),
    ]
    if report["latency"]:
        times.append(Series(name="asked", values=[report["latency"]] * len(fit), color=2, limit=True))
    rates = [Series(name="tokens a second", values=[o["rate"] for o in fit], color=3)]
    if report["throughput"]:
        rates.append(Series(name="asked", values=[report["throughput"]] * len(fit), color=2, limit=True))
    refused = table(("mesh", "why not"), [_plain([o["mesh"], o["refused"]]) for o in found if o["refused"]])
    sections = [
        ("Meshes", "What fits, and what it is estimated to give; weights are of one device.", table(head, rows))
    ]
    for name, series in (("Milliseconds", times), ("Tokens a second", rates)):
        axis = log_axis([v for s in series for v in s.values])
        sections.append((name, "By mesh.", lines(series, labels, axis, name, dots=True) + legend(series)))
    if len(fit) < len(found):
        sections.append(("Refused", "What does not fit, or can't be built.", refused))
    best = report["best"]
    intro = f"On <b>{escape(report['target'])}</b>; rows that each see {report['context']} positions."
    return document("plan", report["model"], (best or "none", bool(best)), intro, sections, dict(report["made"]))
