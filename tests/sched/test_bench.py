"""`radixmesh bench scheduler`: what it counts is there, and the written file says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.errors import ConfigError
from radixmesh.bench import scheduler as bench
from radixmesh.cli import make_app


def test_it_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "scheduler.json"
    flags = ["--running", "8", "--waiting", "60", "--steps", "5", "--policies", "fcfs", "--scale", "16"]
    done = CliRunner().invoke(make_app(), ["bench", "scheduler", *flags, "--out", str(out)])
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    assert record["benchmark"] == "scheduler"
    costs = [f for f in record["figures"] if "case" in f]
    assert [(c["case"], c["waiting"] > 0) for c in costs] == [
        ("decode", False),
        ("decode", True),
        ("pages", True),
        ("flow", True),
        ("groups", True),
        ("grouped flow", True),
    ]
    assert all(0 < c["least"] <= c["median"] <= c["p99"] for c in costs)
    assert costs[0]["rows"] == costs[1]["rows"] == 8
    savings = [f for f in record["figures"] if "order" in f]
    assert [s["order"] for s in savings] == list(bench.ORDERS)
    assert all(s["cached"] == s["shared"] > 0 for s in savings)


def test_an_unknown_policy_is_refused() -> None:
    done = CliRunner().invoke(make_app(), ["bench", "scheduler", "--policies", "lifo"])
    assert isinstance(done.exception, ConfigError)
    assert "lifo" in str(done.exception)


@pytest.mark.parametrize("policy", ["lpm", "dfs-weight"])
def test_waiting_requests_cost_little(policy: str) -> None:
    """Not how fast, which depends on the machine: how much slower than with nobody waiting."""
    alone = bench.measure("decode", policy, 64, 0, 60)
    queued = bench.measure("decode", policy, 64, 2000, 60)
    assert queued.least < alone.least * 1.5 + 50, (alone, queued)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lpm", "fcfs", "dfs-weight"])
def test_the_whole_shared_workload(policy: str) -> None:
    for order in bench.ORDERS:
        saving = bench.share(order, policy)
        assert saving.cached == saving.shared == 458_752, saving
        assert saving.fed == 98_304 + 256 * 127, saving
