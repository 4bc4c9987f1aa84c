"""The devices of the backend as a jax Mesh, and how parameters and caches lie on it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import jax
import numpy as np
from jax._src.lib import xla_client
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from engine.config import Resolved
from engine.errors import ConfigError
from engine.mesh import AXES, RULES, MeshSpec, parts, shard_shape

PLATFORMS = {"cpu": "cpu", "tpu": "tpu,cpu"}
"""What jax is told to start; "gpu" is CUDA or ROCm, as jax finds."""
GPU_MEMORY = 0.9
"""Of a GPU's memory, what jax takes for itself; graphs and libraries take theirs from the rest."""
CACHE = PartitionSpec(None, None, RULES["kv_heads"])
"""Of a cache [layers * pages, page, kv_heads * 2 * head_dim]."""


def find_devices(platform: str, cpus: int = 1) -> list[jax.Device]:
    """The devices of a platform: "cpu", "gpu" or "tpu". Raises ConfigError where jax sees none.

    Where nobody chose jax's platforms, only this one is started: the others cost seconds and print warnings.
    cpus: devices that a CPU is cut into, unless jax has started in this process before.
    """
    if platform in PLATFORMS and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", PLATFORMS[platform])
    if platform == "gpu" and not jax.config.jax_pjrt_client_create_options:
        jax.config.update("jax_pjrt_client_create_options", {"memory_fraction": GPU_MEMORY})
    if platform == "cpu" and cpus > 1:
        with suppress(RuntimeError):  # jax has started: then it has enough, or the mesh is refused
            jax.config.update("jax_num_cpu_devices", cpus)
    try:
        return jax.devices(platform)
    except RuntimeError as missing:
        raise ConfigError(
            f"platform: jax sees no {platform} on this machine ({missing})", field="platform"
        ) from missing


def make_mesh(spec: MeshSpec, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of the first devices, with the axes of engine.mesh. Raises ConfigError naming an axis not built yet."""
    for axis in AXES:
        if axis != "tp" and getattr(spec, axis) > 1:
            raise ConfigError(f"mesh: {axis}={getattr(spec, axis)} is not built in the jax backend yet", field="mesh")
    if len(devices) < spec.size:
        started = ""
        if devices[0].platform == "cpu":
            started = ": jax had started in this process before; set backend.jax.devices on its first engine"
        raise ConfigError(f"mesh: {spec} needs {spec.size} devices, there are {len(devices)}{started}", field="mesh")
    return Mesh(np.array(devices[: spec.size]).reshape([getattr(spec, axis) for axis in AXES]), AXES)


def open_mesh(config: Resolved) -> Mesh:
    """The mesh that a configuration asks for."""
    return make_mesh(config.mesh, find_devices(config.platform, max(config.devices, config.mesh.size)))


def partition(axes: Sequence[str]) -> PartitionSpec:
    """How a parameter with these logical axes is split."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def laid(shape: Sequence[int], axes: Sequence[str], spec: MeshSpec) -> tuple[int, ...]:
    """The shape of a parameter's array on a mesh: the parts of all devices beside each other, with what is padded and
    repeated."""
    local = shard_shape(shape, axes, spec)
    return tuple(n * parts(axis, spec) for n, axis in zip(local, axes, strict=True))


class Spread:
    """Puts arrays whole on every device of a mesh.

    It calls what jax.device_put and jax.make_array_from_callback end in (docs/decisions/0018-programs-ahead.md): their
    way there takes longer than a step's transfer.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
        self._sharding = replicated(mesh)
        self._avals: dict[tuple[tuple[int, ...], np.dtype[Any]], jax.core.ShapedArray] = {}
        self._direct = getattr(xla_client, "batched_device_put", None)  # jax's own, and not for us: it may go

    def __call__(self, value: NDArray[Any]) -> jax.Array:
        """The array on the devices; nobody may change `value` afterwards."""
        if self._direct is None:
            return jax.device_put(value, self._sharding)
        kind = value.shape, value.dtype
        if kind not in self._avals:
            self._avals[kind] = jax.core.ShapedArray(*kind)
        aval, many = self._avals[kind], len(self._devices)
        out: jax.Array = self._direct(aval, self._sharding, [value] * many, self._devices)
        return out


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
