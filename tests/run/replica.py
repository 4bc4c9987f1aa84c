"""A process of a backend whose ranks are all the whole reference backend, and where one misbehaves:
`python replica.py HOW ARGUMENTS of engine.run.worker`. So what engine.run.remote does is seen without a mesh."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from typing import Any

import backends
from backends.api.step import StepResult
from backends.reference.backend import ReferenceBackend
from engine.config import Resolved
from engine.errors import ConfigError, DeviceFailed
from engine.mesh import MeshSpec
from engine.model.spec import ModelSpec
from engine.run import lifeline, worker

HOW, RANK = sys.argv.pop(1), int(sys.argv[2])


class Replica(ReferenceBackend):
    """The reference; rank 1 misbehaves as it is told."""

    def __init__(self, spec: ModelSpec, config: Resolved) -> None:
        if HOW == "refuses" and RANK == 1:
            raise ConfigError("mesh: rank 1 has no device", field="mesh")
        super().__init__(spec, replace(config, mesh=MeshSpec()))

    def forward(self, step: Any) -> Any:
        if HOW == "slow" and RANK == 1:
            time.sleep(1.0)
        if HOW == "raises" and RANK == 1:
            raise ZeroDivisionError("a fault of ours")
        if HOW == "fails" and RANK == 1:
            raise DeviceFailed("no memory is left")
        if HOW == "exits" and RANK == 1:
            os._exit(7)
        return super().forward(step)

    def collect(self, ticket: int, timeout: float = 60.0) -> StepResult:
        if HOW == "hangs" and RANK == 1:
            time.sleep(1000)
        result = super().collect(ticket, timeout)
        return replace(result, tokens=result.tokens + 1) if HOW == "disagrees" and RANK == 1 else result


def opened(name: str, spec: ModelSpec, config: Resolved, member: Any) -> Any:
    assert (name, member.size) == ("torch", 2)
    return Replica(spec, config)


if __name__ == "__main__":
    assert backends.open_backend is worker.open_backend
    worker.open_backend = opened  # type: ignore[assignment]
    lifeline.end(worker.main())
