"""The only place where a backend is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.errors import ConfigError

if TYPE_CHECKING:
    from backends.api.protocol import Backend, Member
    from engine.config import Resolved
    from engine.model.spec import ModelSpec

NAMES = ("jax", "torch", "reference")


def several(config: Resolved) -> bool:
    """Whether a configuration needs a process for each device (engine.run.remote): torch does, jax drives a mesh from
    one."""
    return config.backend == "torch" and config.mesh.size > 1


def open_backend(name: str, spec: ModelSpec, config: Resolved, member: Member | None = None) -> Backend:
    """Open a backend by name; config.deterministic: behind what cuts its steps into tiles of one shape. Imports only
    that backend's libraries. member: which of several processes this is.

    Raises ConfigError naming what is missing.
    """
    if config.deterministic:
        from backends.api.tiled import Tiled

        return Tiled(spec, config, lambda spec, inner: _open(name, spec, inner, member))
    return _open(name, spec, config, member)


def _open(name: str, spec: ModelSpec, config: Resolved, member: Member | None) -> Backend:
    try:
        if name == "jax":
            from backends.jax.backend import JaxBackend

            return JaxBackend(spec, config)
        if name == "torch":
            from backends.torch.backend import TorchBackend

            return TorchBackend(spec, config, member)
    except ModuleNotFoundError as missing:
        if missing.name not in ("jax", "jaxlib", "torch"):
            raise
        raise ConfigError(
            f"backend {name} needs the package {missing.name}: pip install 'radixmesh[{missing.name}]'", field="backend"
        ) from missing
    if name == "reference":
        from backends.reference.backend import ReferenceBackend

        return ReferenceBackend(spec, config)
    raise ConfigError(f"backend: unknown name {name!r}; the backends are {', '.join(NAMES)}", field="backend")
