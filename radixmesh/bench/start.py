"""How long `radixmesh serve` takes to be ready: with nothing kept, with programs kept by an earlier start, from a
bundle, and ready early."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from engine.errors import ConfigError
from radixmesh.bench.serve import processes, reading, started

CASES = ("cold", "kept", "bundle", "early")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Seconds, medians. ready: from the command to the first answer of /readyz; cpu: processor time of all its
    processes until then; stages: of the engine's process."""

    case: str
    repeats: int
    ready: float
    least: float
    cpu: float
    stages: dict[str, float]


def measure(case: str, repeats: int, flags: Sequence[str]) -> Start:
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
            _start(case, where, 0, flags)
        for i in range(repeats):
            took, used, told = _start(case, where, i, flags)
            ready.append(took)
            cpu.append(used)
            stages.append(told)
    return Start(
        case=case,
        repeats=repeats,
        ready=median(ready),
        least=min(ready),
        cpu=median(cpu),
        stages={name: median(told[name] for told in stages) for name in stages[0]},
    )


def _start(case: str, folder: Path, number: int, flags: Sequence[str]) -> tuple[float, float, dict[str, float]]:
    """One server: seconds until it is ready, processor seconds, stages."""
    own = {
        "cold": ["--set", f"backend.jax.cache={folder / str(number)}"],
        "kept": ["--set", f"backend.jax.cache={folder / 'kept'}"],
        "bundle": ["--set", "backend.jax.cache=off", "--bundle", str(folder / "bundle")],
        "early": ["--set", f"backend.jax.cache={folder / str(number)}", "--ready-early"],
    }[case]
    began = time.monotonic()
    with started(["-m", "radixmesh", "serve", "--backend", "jax", "--port", "0", *flags, *own]) as peer:
        if peer.get("/readyz")[0] != 200:
            raise ConfigError("start: the server listens and is not ready", field="start")
        took = time.monotonic() - began
        used = sum(of["cpu"] for of in reading(peer, processes(peer.pid)).values())
        info = json.loads(peer.get("/server_info")[1])
    return took, used, {stage["name"]: stage["seconds"] for stage in info["stages"]}
