"""Which device a configuration asks for, and what is particular to it. One device until the torch mesh is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.config import Resolved
from engine.errors import ConfigError


def open_device(config: Resolved) -> torch.device:
    """The device. Raises ConfigError where it isn't there, or more than one is asked for."""
    if config.mesh.size * config.mesh.ep != 1:
        raise ConfigError(f"mesh: the torch backend runs on one device for now, not {config.mesh}", field="mesh")
    if config.platform == "cpu":
        return torch.device("cpu")
    if config.platform != "gpu":
        raise ConfigError(f"platform: torch runs on cpu and gpu, not {config.platform}", field="platform")
    if not torch.cuda.is_available():
        raise ConfigError(
            "platform: this torch sees no GPU; install a CUDA or ROCm build, or use cpu", field="platform"
        )
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
