"""How long `radixmesh serve` takes to be ready: with nothing kept, with programs (on torch Triton's kernels) kept by an
earlier start, from a bundle, and ready early."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from engine.errors import ConfigError
from radixmesh.bench.serve import processes, reading, started
from radixmesh.bench.workloads import make_config
from radixmesh.engine import DEMO

CASES = {"jax": ("cold", "kept", "bundle", "early"), "torch": ("cold", "kept")}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Seconds, medians. ready: from the command to the first answer of /readyz; cpu: processor time of all its
    processes until then; stages: of the engine's process, those with a dot are parts of others. memory: bytes of the
    last start; weights_gibs: GiB a second of their stage."""

    case: str
    backend: str
    device: str
    repeats: int
    ready: float
    least: float
    cpu: float
    stages: dict[str, float]
    memory: dict[str, int]
    weights_gibs: float


def make_model(folder: Path, shape: str) -> Path:
    """The config.json of a named shape, with the demo model's tokenizer, which a server wants."""
    path = make_config(folder, shape)
    for name in TOKENIZER:
        shutil.copyfile(DEMO / name, path / name)
    return path


def measure(backend: str, case: str, repeats: int, flags: Sequence[str]) -> Start:
    """Start so many servers, one after the other. flags: of `radixmesh serve`."""
    ready, cpu, stages = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        if case == "bundle":
            command = [sys.executable, "-m", "radixmesh", "compile", "--target", "cpu", *flags]
            command += ["--bundle", str(where / "bundle")]
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            if made.returncode:
                raise ConfigError(f"bundle: {(made.stderr.splitlines() or ['failed'])[-1]}", field="bundle")
        if case == "kept":
            _start(backend, case, where, 0, flags)
        for i in range(repeats):
            took, used, info = _start(backend, case, where, i, flags)
            ready.append(took)
            cpu.append(used)
            stages.append({stage["name"]: stage["seconds"] for stage in info["stages"]})
    status = info["started"]
    weights = median(told["weights"] for told in stages)
    return Start(
        case=case,
        backend=backend,
        device=status["device"],
        memory=status["memory"],
        weights_gibs=status["memory"].get("weights", 0) / weights / (1 << 30),
        repeats=repeats,
        ready=median(ready),
        least=min(ready),
        cpu=median(cpu),
        stages={name: median(told[name] for told in stages) for name in stages[0]},
    )


def _start(backend: str, case: str, folder: Path, number: int, flags: Sequence[str]) -> tuple[float, float, Any]:
    """One server: seconds until it is ready, processor seconds, what it says of itself."""
    cache = folder / ("kept" if case == "kept" else str(number))
    own = {
        "cold": ["--set", f"backend.jax.cache={cache}"],
        "kept": ["--set", f"backend.jax.cache={cache}"],
        "bundle": ["--set", "backend.jax.cache=off", "--bundle", str(folder / "bundle")],
        "early": ["--set", f"backend.jax.cache={cache}", "--ready-early"],
    }[case]
    env = os.environ | ({"TRITON_CACHE_DIR": str(cache)} if backend == "torch" else {})
    given = [*flags, *(own if backend == "jax" else ())]
    began = time.monotonic()
    with started(["-m", "radixmesh", "serve", "--backend", backend, "--port", "0", *given], env=env) as peer:
        if peer.get("/readyz")[0] != 200:
            raise ConfigError("start: the server listens and is not ready", field="start")
        took = time.monotonic() - began
        used = sum(of["cpu"] for of in reading(peer, processes(peer.pid)).values())
        info = json.loads(peer.get("/server_info")[1])
    return took, used, info
