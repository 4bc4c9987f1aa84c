"""Golden records: what the decode step of known shapes takes on four chips, kept in the repository.

A record moves when a figure is past its margin, in whichever direction: worse is a fault, better is to be written down
(`radixmesh compile --golden --update`). Memory and collectives that follow from the description are exact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import load
from engine.errors import ConfigError
from engine.target import Target
from radixmesh.compile import gates, report
from radixmesh.compile.run import decide, records

FOLDER = Path(__file__).parents[2] / "benchmarks" / "golden"
CONTEXT = 1024
MARGINS: Mapping[str, float] = {
    "temp": 0.05,
    "code": 0.15,
    "peak": 0.01,
    "cycles": 0.05,
    "dearest": 0.1,
    "turning": 0.05,
}
"""Figure of a program -> share by which it may move. All else may not."""
SLACK = 1 << 20
"""Bytes, or cycles / 100, that always pass: small figures are rough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One shape on one target. part: of what backends.jax.target.examine compiles; fast: `make test` holds it."""

    model: str
    target: str
    tp: int
    part: str = "decode"
    fast: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}@{self.target.removeprefix('tpu:').replace(':', '-')}"


def _cases() -> Iterator[Case]:
    """The 8B shape unrolls on 7x: two and four layers of it stand for it where time is short."""
    for target in ("tpu:v5e:2x4", "tpu:v6e:2x4", "tpu:v5p:2x2x2"):
        yield Case(model="llama-3.1-8b", target=target, tp=8, fast=True)
    yield Case(model="llama-3.1-8b", target="tpu:tpu7x:2x2x1", tp=8, part="layers", fast=True)
    for target in ("tpu:v5e:8x8", "tpu:v5p:4x4x4", "tpu:v6e:16x16"):
        yield Case(model="llama-3.1-70b", target=target, tp=64)
    yield Case(model="llama-3.1-70b", target="tpu:tpu7x:4x4x8", tp=64, part="layers")
    for model in ("qwen3-32b", "qwen3-30b-a3b"):
        for target in ("tpu:v5e:2x4", "tpu:v6e:2x4", "tpu:v5p:2x2x2"):
            yield Case(model=model, target=target, tp=8)
        yield Case(model=model, target="tpu:tpu7x:2x2x1", tp=8, part="layers")
    yield Case(model="gemma-3-27b", target="tpu:v5e:4x4", tp=16, part="layers")  # its windows don't fit eight
    for target in ("tpu:v6e:2x4", "tpu:v5p:2x2x2", "tpu:tpu7x:2x2x1"):
        yield Case(model="gemma-3-27b", target=target, tp=8, part="layers")


CASES = tuple(_cases())
"""Unrolled where the rule is to unroll (7x), or where the pattern has no repeat (62 layers of Gemma-3-27B): whole, they
compile for minutes."""


def measure(case: Case) -> dict[str, Any]:
    """The report of a case now. Raises ConfigError where the records are not here: they are not in the wheel."""
    folder = FOLDER / "models" / case.model
    if not folder.is_dir():
        raise ConfigError(f"golden: {folder} is not there; golden records stand in a checkout", field="golden")
    target = Target.parse(case.target)
    decided = decide(load(None, {"model": str(folder), "mesh": f"tp={case.tp}"}), target, folder)
    return report.make(decided, target, list(records(decided, target, case.part)), CONTEXT)


def figures(made: Mapping[str, Any]) -> dict[str, Any]:
    """What of a report is kept."""
    kept = ("temp", "code", "peak", "alias", "cycles", "dearest", "turning", "loops", "kernels", "collectives", "error")
    return {
        **{k: made[k] for k in ("target", "device", "mesh", "dtype", "stack", "held", "kv_tokens", "max_len")},
        "programs": {
            f"{p['kind']} {p['size']}, {p['layers']} layers": {k: p[k] for k in kept if k in p}
            for p in made["programs"]
        },
        "failed": [
            f"{g['program']}: {g['name']}: {g['found']}, not {g['limit']}" for g in made["gates"] if not g["ok"]
        ],
        "versions": made["versions"],
    }


def kept(case: Case) -> dict[str, Any]:
    """The record of a case. Raises ConfigError where there is none."""
    file = FOLDER / f"{case.name}.json"
    if not file.is_file():
        raise ConfigError(f"golden: no record {file.name}; make it with --golden --update", field="golden")
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def write(case: Case, now: Mapping[str, Any]) -> None:
    """Keep the figures of a case."""
    (FOLDER / f"{case.name}.json").write_text(json.dumps(now, indent=1) + "\n")


def moved(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is no longer as it was kept, in words."""
    out = [
        f"{k}: {now.get(k)}, was {v}" for k, v in was.items() if k not in ("programs", "versions") and now.get(k) != v
    ]
    if was["programs"].keys() != now["programs"].keys():
        return [*out, f"programs: {list(now['programs'])}, were {list(was['programs'])}"]
    for name, old in was["programs"].items():
        new = now["programs"][name]
        out += [
            f"{name}: {k}: {_said(k, new.get(k))}, was {_said(k, v)}" for k, v in old.items() if _off(k, v, new.get(k))
        ]
        out += [f"{name}: {k}: {v}, was not there" for k, v in new.items() if k not in old]
    return out


def _off(key: str, was: Any, now: Any) -> bool:
    if key not in MARGINS or now is None:
        return bool(was != now)
    slack = SLACK // 100 if key in ("cycles", "dearest", "turning") else SLACK
    return bool(abs(now - was) > max(slack, MARGINS[key] * was))


def _said(key: str, value: Any) -> str:
    return gates.size(value) if key in ("temp", "code", "peak", "alias") and value is not None else str(value)
