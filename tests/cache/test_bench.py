"""`radixmesh bench radix`: the workload is the one that peers were measured on, and every token is accounted for."""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from engine.cache.radix import as_key
from radixmesh import cli
from radixmesh.bench.radix import fresh, measure, serve, workload


def test_the_workload_is_the_known_one() -> None:
    prompts = workload(2000)
    lengths = [len(p) for p in prompts]
    assert (len(prompts), min(lengths), max(lengths), sum(lengths)) == (2000, 512, 4095, 4_640_035)
    assert sha256(b"".join(as_key(p) for p in prompts)).hexdigest()[:16] == "13c09c086ea7e45d"
    assert workload(3, seed=1) != workload(3)


@pytest.mark.parametrize("page", [1, 16])
def test_every_token_is_accounted_for(page: int) -> None:
    keys = [as_key(p) for p in workload(60)]
    tree = fresh(page, 60_000)
    spent, matched, evicted = serve(tree, keys)
    whole = sum(len(key) // 4 // page * page for key in keys)
    assert spent == 0
    assert 0 < matched < whole
    assert whole - matched == evicted + tree.held[0] * page
    assert evicted > 0
    assert tree.evictable == tree.held


def test_match_is_part_of_the_total() -> None:
    cost = measure(16, 40, 60_000, repeats=2)
    assert 0 < cost.match_best <= cost.match
    assert 0 < cost.best <= cost.total < 1e5
    assert 0 < cost.cached < 1


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "radix.json"
    for pages, code in (("1,16", 0), ("16,0", 2), ("129", 2), ("x", 2)):
        command = ["radixmesh", "bench", "radix", "--pages", pages, "--requests", "30", "--repeats", "1"]
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(out)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code in ((0, None) if code == 0 else (code,))
    assert "pages: 'x'" in capsys.readouterr().err
    record = json.loads(out.read_text())
    assert record["benchmark"] == "radix"
    assert [f["page"] for f in record["figures"]] == [1, 16]
