"""The processes of a mesh: sums and joins between them, through a group that the backend holds."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from backends.api.protocol import Member
from engine.mesh import MeshSpec, parts

LOOPBACK = "127.0.0.1"
PATIENCE = timedelta(hours=1)
"""How long a process waits for another one. Whoever collects a step has a deadline of its own, and ends them all."""


class Comm:
    """models_torch.ops.Comm over gloo on a CPU and NCCL (RCCL) on GPUs. No state of torch.distributed is touched.

    The processes meet in a file of the member's folder. Gloo then has connections of its own on the loopback, at ports
    that the system picks.
    """

    def __init__(self, mesh: MeshSpec, member: Member, device: torch.device) -> None:
        self.mesh, self.member, self.held = mesh, member, device.type != "cpu"
        store = distributed.FileStore(str(Path(member.folder) / "group"), member.size)
        if device.type == "cpu":
            gloo = distributed.ProcessGroupGloo
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname=LOOPBACK)]
            options._timeout = PATIENCE
            self.group = gloo(store, member.rank, member.size, options)
        else:
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = PATIENCE
            self.group = distributed.ProcessGroupNCCL(store, member.rank, member.size, options)
        self.psum(torch.zeros(1, device=device))  # connects: what can't be is told now, not by the first step

    def parts(self, axis: str) -> int:
        """Processes that split the logical axis."""
        return parts(axis, self.mesh)

    def index(self, axis: str) -> int:
        """Which part this process holds."""
        return self.member.rank if self.parts(axis) > 1 else 0

    def psum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, in place; every process gets the same bits."""
        self.group.allreduce([x]).wait()
        return x

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The parts of all processes, joined along `dim`."""
        out = [torch.empty_like(x) for _ in range(self.member.size)]
        self.group.allgather([out], [x]).wait()
        return torch.cat(out, dim)

    def close(self) -> None:
        """Leave the group."""
        self.group.shutdown()
