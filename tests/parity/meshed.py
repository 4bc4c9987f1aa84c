"""One model on meshes, in a process of its own: python -m tests.parity.meshed BACKEND SIZES FOLDER PROMPTS OUT PAIRS

How many devices jax has is settled when it starts, so meshes have a process, the largest first (SIZES: "4,2"). It reads
the prompts (JSON) and writes what it found to OUT: inner values and tokens on each mesh, whole and chunked, and on one
device; what the engine says, cold and warm; the collectives of jax's programs. PAIRS: more keys, KEY=VALUE each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from backends.api.build import Host
from backends.api.protocol import Backend
from backends.jax import hlo
from engine.config import load
from engine.model.checkpoint import Checkpoint
from engine.run import start
from engine.run.start import Decided, decide
from radixmesh import Engine
from radixmesh.parity.readings import Reading, read_backend

SMALL: dict[str, Any] = {
    "dtype": "float32",
    "sched.slots": 4,
    "cache.page": 8,
    "model.max_len": 160,
    "sched.max_tokens": 64,
    "sched.token_buckets": [16, 64],
}
MADE = 64


class Kept:
    """A backend that an engine opens and closes, and that is there before and afterwards: starting it costs seconds."""

    def __init__(self, device: Backend) -> None:
        self.device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)

    def close(self) -> None:
        """Not yet."""


def opened(backend: str, mesh: str, folder: Path) -> tuple[Decided, Backend]:
    decided = decide(load(None, SMALL | {"model": str(folder), "backend": backend, "mesh": mesh}), folder)
    device = start.open_device(decided)
    device.load(Checkpoint(folder, decided.spec))
    return decided, device


def collectives(device: Backend) -> list[dict[str, int]]:
    """How often each collective runs in each compiled step, as it is served: without taps."""
    made = getattr(getattr(device, "programs", None), "made", {})
    steps = [p for key, p in made.items() if key.kind == "step" and not key.taps]
    return [{name: many for name, (many, _) in hlo.read(p.as_text()).collectives.items()} for p in steps]


def converse(backend: str, mesh: str, folder: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """The same prompts through an engine, together: cold, from a warm cache, and drawn with a seed."""
    with Engine(str(folder), backend=backend, mesh=mesh, skip_tokenizer=True, **SMALL) as engine:
        greedy = {"temperature": 0, "max_new_tokens": MADE, "ignore_eos": True}
        drawn = greedy | {"temperature": 0.9, "top_p": 0.9, "seed": 11}
        runs = [engine.generate(token_ids=prompts, sampling_params=p) for p in (greedy, greedy, drawn)]
        status = engine.status()
        return {
            "tokens": [[r["output_ids"] for r in run] for run in runs],
            "cached": [[r["meta_info"]["cached_tokens"] for r in run] for run in runs],
            "late": status.compiles_after_ready,
            "device": status.device,
            "memory": status.memory,
        }


def finished(device: Any, prompt: Sequence[int]) -> bool:
    """Whether a step is over when the next one's forward comes back."""
    host = Host(device)
    first, second = host.open(), host.open()
    tickets = [host.enqueue([(text, host.row(text, prompt))]) for text in (first, second)]
    over = bool(device.flights[tickets[0]].made.is_ready())
    for ticket in tickets:
        device.collect(ticket)
    return over


def save(out: dict[str, Any], name: str, reading: Reading) -> None:
    out |= {f"{name}/value/{k}": v for k, v in reading.values.items()}
    out |= {f"{name}/tokens": np.array(reading.tokens), f"{name}/margins": np.array(reading.margins)}


def restore(found: Any, name: str) -> Reading:
    """A reading as `save` left it."""
    start = f"{name}/value/"
    values = {key.removeprefix(start): found[key] for key in found.files if key.startswith(start)}
    return Reading(
        name=name,
        values=values,
        tokens=found[f"{name}/tokens"].tolist(),
        margins=found[f"{name}/margins"].tolist(),
    )


def look(backend: str, size: int, folder: Path, prompts: list[list[int]], out: dict[str, Any]) -> dict[str, Any]:
    """Everything on one mesh: readings go into `out`, facts come back."""
    mesh = f"tp={size}"
    decided, device = opened(backend, mesh, folder)
    with closing(device):
        for name, count, chunk in (("whole", MADE, 64), ("chunked", 2, 16)):
            save(out, f"{size}/{name}", read_backend(mesh, device, decided.spec, prompts[0], count, chunk))
        open_device = start.open_device
        start.open_device = lambda decided: Kept(device)  # type: ignore[assignment]
        try:
            talk = converse(backend, mesh, folder, prompts)
        finally:
            start.open_device = open_device
        over, counts = backend == "torch" or finished(device, prompts[0]), collectives(device)
    return {"collectives": counts, "engine": talk, "finished": over}


def main(backend: str, sizes: str, folder: Path, prompts: Path, target: Path) -> None:
    asked = json.loads(prompts.read_text())
    out: dict[str, Any] = {}
    facts = {size: look(backend, int(size), folder, asked, out) for size in sizes.split(",")}
    decided = decide(load(None, SMALL | {"model": str(folder), "backend": backend}), folder)
    with closing(start.open_backend(backend, decided.spec, decided.resolved)) as alone:
        alone.load(Checkpoint(folder, decided.spec))
        save(out, "alone", read_backend("alone", alone, decided.spec, asked[0], MADE, 64))
    np.savez(target, facts=json.dumps(facts), **out)


if __name__ == "__main__":
    SMALL |= dict(pair.split("=", 1) for pair in sys.argv[6:])
    main(sys.argv[1], sys.argv[2], *(Path(p) for p in sys.argv[3:6]))
