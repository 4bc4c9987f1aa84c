"""Programs that jax keeps from one start to the next: the second start compiles none of them and computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

START = """
import json, sys, jax
from radixmesh import Engine
seen = []
jax.monitoring.register_event_listener(lambda name, **more: seen.append(name.rpartition("/")[2]))
small = {"sched.token_buckets": [8], "sched.max_tokens": 8, "sched.slots": 2, "sched.max_rows": 2}
with Engine(backend="jax", **small, **{"backend.jax.cache": sys.argv[1]}) as engine:
    ids = engine.generate(token_ids=[5, 6, 7], sampling_params={"temperature": 0, "max_new_tokens": 8})["output_ids"]
print(json.dumps({"ids": ids, "hits": seen.count("cache_hits"), "misses": seen.count("cache_misses")}))
"""


def start(folder: str) -> dict[str, Any]:
    run = subprocess.run([sys.executable, "-c", START, folder], capture_output=True, text=True, timeout=200, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def test_a_second_start_loads_what_the_first_compiled(tmp_path: Path) -> None:
    first, second = start(str(tmp_path / "kept")), start(str(tmp_path / "kept"))
    assert (first["hits"], second["misses"]) == (0, 0)
    assert first["misses"] == second["hits"] > 0
    assert first["ids"] == second["ids"] == start("off")["ids"]
    assert len(list((tmp_path / "kept").iterdir())) == 1  # a folder for this processor
