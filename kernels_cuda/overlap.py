"""Kernels that start while the one before them still runs: programmatic dependent launch, on sm_90 and later.

A kernel that takes part says `ready` first (attention late: its programs outnumber a device's room, which those that
wait would take), so that the next may take what is free of the device, and `wait`s, until
all that was enqueued before it has ended, before it reads what others wrote and before it writes. Ahead of that it
reads weights at most. A kernel that takes no part is a barrier.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl


@lru_cache(maxsize=8)
def able(device: torch.device) -> bool:
    """Whether a device lets kernels overlap."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)


def options(x: torch.Tensor) -> dict[str, Any]:
    """What a kernel that takes part is launched with, on the device of a tensor."""
    return {"OVERLAP": True, "launch_pdl": True} if able(x.device) else {"OVERLAP": False}


@triton.jit
def ready(OVERLAP: tl.constexpr):
    """Once all programs have said so, or ended, the next kernel's start."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Until all kernels before have ended, and what they wrote is there."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
