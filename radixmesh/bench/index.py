"""The page that names every file of figures: python -m radixmesh.bench.index writes benchmarks/README.md anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"
HEAD = """# Benchmarks

How each figure in [results/](results) was made: the command, the machine, the commit, and what came of it. Versions
and all figures are in the files. `radixmesh bench COMMAND --help` says what a command measures; `--plot FILE.html` (or
`.svg`) draws charts of `offline`, `latency` and `kernels`. A commit with a `+` had changes on top. [golden/](golden)
has what `radixmesh compile` makes of models for TPUs, without them ([docs/compile.md](../docs/compile.md)).

This page is made: `python -m radixmesh.bench.index`.

| file | command | machine | commit | figures |
|---|---|---|---|---|
"""


def make(folder: Path) -> str:
    """The page of the results in a folder."""
    return HEAD + "".join(_row(path) for path in sorted(folder.glob("*.json")))


def _row(path: Path) -> str:
    record = json.loads(path.read_text())
    machine = record["machine"]
    what = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    told = FIGURES[record["benchmark"]](record["figures"])
    cells = (f"[{path.name}](results/{path.name})", f"`{record['command']}`", what, record["commit"] or "-", told)
    return f"| {' | '.join(cells)} |\n"


def _workloads(figures: Any) -> str:
    parts = []
    for f in figures:
        each = f"{f['ms_per_token']:.3f} ms/token" if "ms_per_token" in f else f"{f['seconds']:.3f} s"
        parts.append(f"{f['workload']} {each}")
    return f"{figures[0]['subject']}: {', '.join(parts)}; ready in {figures[0]['ready']:.1f} s"


def _offline(figures: Any) -> str:
    best = max(f["batch"] for f in figures)
    return f"tokens/s at batch {best}: " + ", ".join(
        f"{f['subject']} {f['decode']:.0f}" for f in figures if f["batch"] == best
    )


def _kernels(figures: Any) -> str:
    if any("chip" in f for f in figures):
        made = sum("error" not in f for f in figures)
        return f"{made} programs compiled, cycles of each"
    copy = next((f for f in figures if f["case"] == "ceilings"), {})
    shares = [f["of_copy"] for f in figures if "of_copy" in f]
    ceilings = f"copy {copy.get('copy_gbs', 0) / 1000:.2f} TB/s, matrices {copy.get('matrix_tflops', 0)} TFLOP/s"
    return f"{ceilings}; decode reads at {min(shares):.2f} to {max(shares):.2f} of a copy" if shares else ceilings


def _parity(figures: Any) -> str:
    worst = max(figures, key=lambda f: f["summary"]["kl_mean"])
    good = sum(f["ok"] for f in figures)
    return (
        f"{good} of {len(figures)} settings within thresholds; worst mean KL {worst['summary']['kl_mean']:.1e} "
        f"({worst['model']}, {worst['case']})"
    )


def _deterministic(figures: Any) -> str:
    parts = []
    for f in figures:
        usual, exact = (f["cost"][mode]["tokens_per_second"] for mode in ("usual", "deterministic"))
        same = "every bit equal" if f["equal"] else "NOT equal"
        parts.append(f"{f['model']}, {f['dtype']}: {same}, {exact:.0f} of {usual:.0f} tokens/s")
    return "; ".join(parts)


def _latency(figures: Any) -> str:
    return "; ".join(
        f"{f['workload']}, {f['load']}: first token {1e3 * f['ttft']['p50']:.0f} ms, between "
        f"{1e3 * f['itl']['p50']:.1f} ms (medians)"
        for f in figures
    )


def _prefix(figures: Any) -> str:
    with_, without = (next(f["seconds"] for f in figures if f["radix"] == on) for on in (True, False))
    return f"{without / with_:.1f} times faster with the prefix cache"


def _start(figures: Any) -> str:
    return ", ".join(f"{f['case']} {f['ready']:.1f} s" for f in figures)


def _serve(figures: Any) -> str:
    f = figures["radixmesh"]
    return f"{f['streams']} streams, {f['tokens_per_second']:.0f} tokens/s, errors: {len(f['errors'])}"


def _scheduler(figures: Any) -> str:
    f = next(f for f in figures if f.get("case") == "decode")
    return f"{f['running']} requests that decode: plan {f['plan']:.0f} us, commit {f['commit']:.0f} us a step"


def _compiled(figures: Any) -> str:
    return "; ".join(
        f"{f['rows']} rows: kernels {f['kernels_us']:.1f} us, torch.compile {f['compiled_us']:.1f} us" for f in figures
    )


FIGURES: Mapping[str, Callable[[Any], str]] = {
    "agree": lambda fs: ", ".join(f"{f['kind']} {f['equal']} of {f['prompts']} sequences equal" for f in fs),
    "compiled": _compiled,
    "deterministic": _deterministic,
    "dispatch": lambda fs: ", ".join(f"{f['stack']}: host {f['host']:.2f} ms a step" for f in fs),
    "kernels": _kernels,
    "latency": _latency,
    "offline": _offline,
    "parity": _parity,
    "prefix": _prefix,
    "radix": lambda fs: ", ".join(f"pages of {f['page']}: {f['total']:.0f} us a request" for f in fs),
    "scheduler": _scheduler,
    "serve": _serve,
    "start": _start,
    "workloads": _workloads,
}
"""By the name of the benchmark."""

if __name__ == "__main__":
    (ROOT / "README.md").write_text(make(ROOT / "results"), encoding="utf-8")
