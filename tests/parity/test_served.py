"""`radixmesh bench parity`, `deterministic`: texts that are served against float32, and every bit of a mode."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from radixmesh.bench.deterministic import told
from radixmesh.cli import make_app
from radixmesh.parity import served


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fewer and shorter texts, and one thread."""
    sizes = {"ROWS": 6, "GROUPS": ((4, 64), (2, 32)), "BEGIN": 112, "OWN": 8, "SPAN": 112 + 25 + 8}
    for name, value in sizes.items():
        monkeypatch.setattr(served, name, value)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*args: str) -> Any:
    return CliRunner().invoke(make_app(), ["bench", *args])


def test_served_texts_agree_with_float32(tmp_path: Path) -> None:
    """With shared prefixes and a cache of 8 bits; the share of positions is what was decoded."""
    out = tmp_path / "p.json"
    done = run("parity", "--models", "demo", "--only", "c", "--set", "backend.torch.graphs=off", "--out", str(out))
    assert done.exit_code == 0, done.output
    figures = {f["case"]: f for f in json.loads(out.read_text())["figures"]}
    assert {"bf16 cascade", "fp8 cache", "int8 cache"} <= set(figures)
    for f in figures.values():
        assert f["ran"]["together"] == 7
        assert f["summary"]["count"] == 48
        assert 0 < f["summary"]["kl_mean"] < 0.05
    assert figures["bf16 cascade"]["summary"]["kl_mean"] < figures["fp8 cache"]["summary"]["kl_mean"]


@pytest.mark.parametrize("fault", ["page", "unasked"])
def test_a_fault_is_told(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are said to share one page more than they do; steps that take no notice of what is shared."""
    honest = served._run

    def wrong(host: Any, fed: Sequence[Any], alike: Any) -> Any:
        made = alike.copy() if fault == "page" else alike[:0]
        if fault == "page":
            made[1, 1] += 1  # a row whose pages are others
        return honest(host, fed, made)

    monkeypatch.setattr(served, "_run", wrong)
    done = run("parity", "--models", "demo", "--only", "float32")
    assert done.exit_code == 1, done.output
    assert ("kl_mean" if fault == "page" else "did not run as they were set") in done.output


def test_names_that_are_none() -> None:
    done = run("parity", "--only", "fp9")
    assert done.exit_code != 0
    assert "no case holds 'fp9'" in str(done.exception)


def test_one_bit_is_told() -> None:
    first = {i: ([1, 2], [(np.float32(-0.5).item(), 1, None)], []) for i in range(3)}
    off = [(np.nextafter(np.float32(-0.5), np.float32(0)).item(), 1, None)]
    found = first | {1: ([1, 2], off, []), 2: ([1, 3], first[2][1], [])}
    assert told(first, found) == {"of": 3, "tokens": 2, "logprobs": 2}
