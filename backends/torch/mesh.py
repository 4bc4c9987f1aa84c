"""Which device of a mesh this process drives, and what is particular to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from backends.api.protocol import Member
from engine.config import Resolved
from engine.errors import ConfigError
from engine.mesh import AXES


def open_device(config: Resolved, member: Member | None = None) -> torch.device:
    """The device: of several processes each drives the one of its rank, and of a CPU's cores each takes its share.

    Raises ConfigError where it isn't there, or a mesh has no process for each device.
    """
    for axis in AXES:
        if axis != "tp" and getattr(config.mesh, axis) > 1:
            raise ConfigError(f"mesh: {axis} is not built in the torch backend yet, {config.mesh} asks", field="mesh")
    if config.mesh.size != (1 if member is None else member.size):
        raise ConfigError(
            f"mesh: the torch backend has a process for each device of {config.mesh}; "
            "engine.run.remote.RemoteBackend starts them",
            field="mesh",
        )
    if config.platform == "cpu":
        if member is not None:
            torch.set_num_threads(max(1, torch.get_num_threads() // member.size))
        return torch.device("cpu")
    if config.platform != "gpu":
        raise ConfigError(f"platform: torch runs on cpu and gpu, not {config.platform}", field="platform")
    if not torch.cuda.is_available():
        raise ConfigError(
            "platform: this torch sees no GPU; install a CUDA or ROCm build, or use cpu", field="platform"
        )
    if member is not None:
        if member.rank >= torch.cuda.device_count():
            raise ConfigError(
                f"mesh: {config.mesh} needs {member.size} GPUs, torch sees {torch.cuda.device_count()}", field="mesh"
            )
        torch.cuda.set_device(member.rank)
    return torch.device("cuda", torch.cuda.current_device())


def name(device: torch.device) -> str:
    """For people: "cpu", "cuda:0 NVIDIA H200"."""
    return "cpu" if device.type == "cpu" else f"{device} {torch.cuda.get_device_name(device)}"


@contextmanager
def exact(device: torch.device, dtype: str) -> Iterator[None]:
    """float32 means float32: no TF32 inside, whatever the process has set, and its setting again afterwards.

    torch keeps this setting per process, so other threads see it for as long.
    """
    if device.type == "cpu" or dtype != "float32":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
