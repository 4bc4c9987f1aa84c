"""Host time of a step: how long `Backend.forward` takes to return, where the step before is over."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from backends import open_backend
from backends.api.conformance.bench import Weights
from engine.config import load
from engine.run.loop import Loop
from engine.run.messages import Submit
from engine.run.start import decide
from engine.sampling import SamplingParams
from engine.sched.request import Request
from engine.sched.scheduler import Scheduler

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
"""A model so small that a step costs the device little: what the host does is the same for a large one."""
SPARE = 32
"""Positions beside those of the timed steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Milliseconds of `forward`, medians and ninetieth percentiles. host: processor time of the thread that calls it,
    what a step costs the host; wall: by the clock, where a CPU's devices take the cores from that thread as soon as
    they are given work. turn: of the whole loop, by the clock."""

    mesh: str
    stack: str
    rows: int
    steps: int
    host: float
    host_high: float
    wall: float
    wall_high: float
    turn: float


class Timed:
    """A backend whose forwards are timed: (processor, clock) in seconds."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.took = inner, list[tuple[float, float]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def forward(self, step: Any) -> Any:
        """As the backend within."""
        host, wall = time.thread_time(), time.perf_counter()
        try:
            return self.inner.forward(step)
        finally:
            self.took.append((time.thread_time() - host, time.perf_counter() - wall))


def measure(mesh: str, rows: int, steps: int, settings: Mapping[str, Any]) -> Dispatch:
    """Decode steps of `rows` rows with random weights, one step out at a time."""
    sizes = {"sched.slots": rows, "sched.max_tokens": rows, "sched.token_buckets": [rows], "sched.depth": 1}
    length = steps + SPARE
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE | {"max_position_embeddings": length}))
        given = {"model": folder, "backend": "jax", "mesh": mesh, "cache.tokens": rows * (length + 32), **sizes}
        decided = decide(load(None, given | dict(settings)), Path(folder))
    backend = Timed(open_backend("jax", decided.spec, decided.resolved))
    try:
        backend.load(Weights(spec=decided.spec))
        backend.warmup()
        scheduler = Scheduler(backend.limits, radix=False)
        loop = Loop(scheduler, backend, lambda outputs: None)  # type: ignore[arg-type]
        greedy = SamplingParams(max_new_tokens=length - 1, ignore_eos=True, temperature=0.0)
        for i in range(rows):
            request = Request(rid=str(i), tokens=(1 + i % 1000,), params=greedy, seed=i, eos=frozenset())
            loop.take([Submit(request=request)])
        while any(not run.decoding for run in scheduler.running) or len(scheduler.running) < rows:
            loop.turn()
        for _ in range(SPARE // 2):
            loop.turn()
        backend.took.clear()
        turns = []
        for _ in range(steps):
            began = time.perf_counter()
            loop.turn()
            turns.append(time.perf_counter() - began)
        assert len(scheduler.running) == rows, "all rows decoded in every step that was timed"
    finally:
        backend.close()
    host, wall = (sorted(1000 * t for t in took) for took in zip(*backend.took, strict=True))
    return Dispatch(
        mesh=mesh or "one device",
        stack=decided.resolved.stack,
        rows=rows,
        steps=len(host),
        host=median(host),
        host_high=host[len(host) * 9 // 10],
        wall=median(wall),
        wall_high=wall[len(wall) * 9 // 10],
        turn=1000 * median(turns),
    )
