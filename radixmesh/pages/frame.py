"""The frame of a page: one file, no script, nothing beside it; light or dark as its reader has it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any


def document(
    kind: str,
    title: str,
    verdict: tuple[str, bool],
    intro: str,
    sections: Sequence[tuple[str, str, str]],
    made: dict[str, Any],
) -> str:
    """A page. verdict: a word, and whether it is a good one; intro: HTML; sections: (heading, what it shows, HTML);
    made: radixmesh.bench.record.made."""
    word, good = verdict
    body = "".join(f"<section><h2>{h}</h2><p>{said}</p>{inner}</section>" for h, said, inner in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{escape(kind)}: {escape(title)}</title>'
        f"<style>{CSS}</style></head><body><main><header><h1>{escape(title)}</h1>"
        f'<span class="pill {"good" if good else "bad"}">{escape(word)}</span></header>'
        f"<p>{intro}</p>{body}{footer(made)}</main></body></html>\n"
    )


def footer(made: dict[str, Any]) -> str:
    """Where and with what it was made."""
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    device = made["machine"].get("gpu") or made["machine"]["cpu"]
    lines = (made["command"], f"{device}, {made['machine']['cores']} cores; {versions}; commit {made['commit'] or '-'}")
    return f"<footer>{'<br>'.join(escape(line) for line in lines)}</footer>"


CSS = """
:root{color-scheme:light dark;--bg:#fbfaf8;--card:#fff;--ink:#23211f;--soft:#6d6862;--rule:#e6e1da;--good:#1f7a4d;
--bad:#b3261e;--c0:#2f6fb3;--c1:#d97a22;--c2:#3b8f5a;--c3:#a3478f;--c4:#7a6a2c;--c5:#4f5d75}
@media(prefers-color-scheme:dark){:root{--bg:#171614;--card:#201e1c;--ink:#eceae6;--soft:#a49e96;--rule:#36322e;
--good:#62c793;--bad:#ff8a80;--c0:#7db2ea;--c1:#f0a55d;--c2:#7cc796;--c3:#d78fc7;--c4:#c9b76a;--c5:#a3b0c7}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:940px;margin:0 auto;padding:32px 20px 64px}header{display:flex;align-items:center;gap:14px}
h1{font-size:26px;margin:0}h2{font-size:17px;margin:0 0 2px}p{color:var(--soft);margin:4px 0 14px}p b{color:var(--ink)}
section{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:18px 20px;margin:18px 0}
.pill{padding:2px 12px;border-radius:99px;font-weight:600;font-size:13px;border:1px solid}
.good,.ok{color:var(--good)}.bad{color:var(--bad)}td.bad{font-weight:700}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap}
th:first-child{text-align:left;font-weight:500}tr:last-child>*{border-bottom:0}
td.text{white-space:normal;text-align:left;min-width:240px}
small{display:block;color:var(--soft);font-size:11px;font-weight:400;line-height:1.2}
svg{width:100%;height:auto;display:block}.grid{stroke:var(--rule)}
.tick,.value{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}.value{font-size:10px}
.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}
.limit{fill:none;stroke:var(--c);stroke-width:1.2;stroke-dasharray:5 4;opacity:.7}.dot,.bar{fill:var(--c)}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.legend{display:flex;flex-wrap:wrap;gap:6px 18px;margin-top:8px;font-size:13px}
.key{display:flex;align-items:center;gap:7px}
.swatch{width:12px;height:12px;border-radius:3px;background:var(--c)}
footer{color:var(--soft);font-size:12px}
.dash{width:18px;height:0;border-top:2px dashed var(--c);opacity:.7}
"""
