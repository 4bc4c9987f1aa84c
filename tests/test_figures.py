"""Figures that are kept are named with their command; charts of figures are SVG."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine.errors import ConfigError
from radixmesh.bench import index
from radixmesh.bench.latency import Load, loads
from radixmesh.bench.plot import CHARTS, draw
from radixmesh.cli import make_app

RESULTS = index.ROOT / "results"


def test_the_page_names_every_file_with_its_command() -> None:
    page = (index.ROOT / "README.md").read_text()
    assert page == index.make(RESULTS), "python -m radixmesh.bench.index"
    for path in RESULTS.glob("*.json"):
        assert path.name in page
        assert json.loads(path.read_text())["command"] in page


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_charts_of_kept_figures(path: Path, tmp_path: Path) -> None:
    record = json.loads(path.read_text())
    if record["benchmark"] not in CHARTS:
        pytest.skip("has no charts")
    for name in ("a.svg", "a.html"):
        draw(tmp_path / name, record)
    svg = ET.parse(tmp_path / "a.svg").getroot()
    assert len(svg.findall("{http://www.w3.org/2000/svg}svg")) == (tmp_path / "a.html").read_text().count("<svg ")
    marks = [*svg.iter("{http://www.w3.org/2000/svg}rect"), *svg.iter("{http://www.w3.org/2000/svg}polyline")]
    assert marks


def test_latency_of_a_workload(tmp_path: Path) -> None:
    out, plot = tmp_path / "l.json", tmp_path / "l.svg"
    line = "bench latency --workload shared --backend reference --scale 0.03 --requests 4 --concurrency 1,4 --rate 50"
    done = CliRunner().invoke(
        make_app(), [*line.split(), "--set", "cache.page=4", "--out", str(out), "--plot", str(plot)]
    )
    assert done.exit_code == 0, done.output
    figures: list[dict[str, Any]] = json.loads(out.read_text())["figures"]
    assert [f["load"] for f in figures] == ["1 at once", "4 at once", "50 a second"]
    for f in figures:
        assert f["output_tokens"] == 4 * 3
        assert f["cached"] > 0
        for p in ("p50", "p99", "max"):
            assert 0 < f["ttft"][p] <= f["e2e"][p] <= f["seconds"]
    assert ET.parse(plot).getroot().tag.endswith("svg")


def test_loads_and_files_that_are_none(tmp_path: Path) -> None:
    assert loads("1,2", "0.5") == [Load(concurrency=1), Load(concurrency=2), Load(rate=0.5)]
    for concurrency, rate in (("0", ""), ("1.5", ""), ("", "fast"), ("", "")):
        with pytest.raises(ConfigError, match=r"concurrency|rate"):
            loads(concurrency, rate)
    done = CliRunner().invoke(make_app(), ["bench", "latency", "--plot", str(tmp_path / "a.png")])
    assert "end it with .html or .svg" in str(done.exception)


def test_starts_that_are_none() -> None:
    for words, said in (("--backend reference", "jax, torch"), ("--backend torch --cases bundle", "cold, kept")):
        done = CliRunner().invoke(make_app(), ["bench", "start", *words.split()])
        assert said in str(done.exception)


def test_what_is_of_bench_is_no_command_of_its_own() -> None:
    app = CliRunner().invoke(make_app(), ["--help"]).output
    assert "parity" in app
    assert "latency" not in app
