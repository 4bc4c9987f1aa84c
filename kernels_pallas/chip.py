"""The chip that a kernel is compiled for, and what it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax.experimental.pallas import tpu as pltpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """name: "v5e", "v5p", "v6e" or "7x". vmem, smem: bytes of each core's memory."""

    name: str
    vmem: int
    smem: int


INTERPRETED = Chip(name="interpreted", vmem=128 << 20, smem=1 << 20)
"""What the interpreter on a CPU stands for."""


def chip() -> Chip:
    """The chip of the mesh in use (`jax.set_mesh`), or of this process's own device; INTERPRETED where that is no TPU.

    Raises ValueError for a TPU that jax does not know.
    """
    try:
        info = pltpu.get_tpu_info()
    except ValueError as unknown:
        if pltpu.is_tpu_device():
            raise ValueError(f"chip: no facts of this TPU: {unknown}") from unknown
        return INTERPRETED
    return _facts(info)


def named(name: str) -> Chip:
    """A chip that is not here: "v5e", "v5p", "v6e" or "7x". Raises ValueError for another."""
    version = pltpu.ChipVersion(name)
    return _facts(pltpu.get_tpu_info_for_chip(version, 2 if version.supports_megacore else 1))


def _facts(info: Any) -> Chip:
    return Chip(name=info.chip_version.value, vmem=info.vmem_capacity_bytes, smem=info.smem_capacity_bytes)
