"""How a model is split over devices: mesh, devices."""

from __future__ import annotations

from engine.config import Config
from engine.errors import ConfigError
from engine.mesh import AXES, MeshSpec, shard_shape
from engine.model.params import params
from engine.model.spec import ModelSpec
from engine.resolve.facts import Decision, Device


def decide_mesh(config: Config, spec: ModelSpec, mesh: MeshSpec, device: Device) -> list[Decision]:
    """A mesh that `check_mesh` took."""
    return [Decision(field="mesh", value=mesh, why=_split(mesh, spec, device)), _devices(config, mesh, device)]


def check_mesh(mesh: MeshSpec, spec: ModelSpec, device: Device) -> None:
    """Refuse a mesh by name: an axis that is not built, devices that aren't there, a dimension that is not divided."""
    for axis in AXES:
        if axis != "tp" and getattr(mesh, axis) > 1:
            raise ConfigError(
                f"mesh: {axis}={getattr(mesh, axis)} is not built yet; only tp is, on one host", field="mesh"
            )
    if mesh.size > 1 and device.backend == "reference":
        raise ConfigError(f"mesh: the reference backend runs on one device, not {mesh}", field="mesh")
    if device.platform != "cpu" and mesh.size > device.count:
        raise ConfigError(
            f"mesh: {mesh} needs {mesh.size} devices, this host has {device.count} x {device.kind}", field="mesh"
        )
    for p in params(spec).values():
        try:
            shard_shape(p.shape, p.axes, mesh)
        except ConfigError as error:
            raise ConfigError(f"{error} (parameter {p.name} of this model)", field="mesh") from error


def _split(mesh: MeshSpec, spec: ModelSpec, device: Device) -> str:
    """What a mesh does to a model, in words."""
    if mesh.size == 1:
        return "one device"
    heads = {layer.mixer.kv_heads for layer in spec.layers}
    repeated = sorted(n for n in heads if n < mesh.tp)
    said = [f"query heads, feed-forward and vocabulary in {mesh.tp} parts"]
    if repeated:
        said.append(f"each kv head on {mesh.tp // repeated[0]} devices")
    if spec.vocab % mesh.tp:
        said.append(f"the vocabulary of {spec.vocab} padded")
    return ", ".join([*said, "a process each" if device.backend == "torch" else "one process"])


def _devices(config: Config, mesh: MeshSpec, device: Device) -> Decision:
    """CPU devices that jax is to make."""
    asked = config.backend.jax.devices
    if (device.backend, device.platform) != ("jax", "cpu") or asked is None:
        return Decision(field="devices", value=mesh.size, why="as the mesh needs")
    if asked < mesh.size:
        raise ConfigError(
            f"backend.jax.devices: {asked} is less than the {mesh.size} of {mesh}", field="backend.jax.devices"
        )
    return Decision(field="devices", value=asked, why="backend.jax.devices")
