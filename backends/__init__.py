"""The only place where a backend is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.errors import ConfigError

if TYPE_CHECKING:
    from backends.api.protocol import Backend
    from engine.config import Resolved
    from engine.model.spec import ModelSpec

NAMES = ("jax", "torch", "reference")


def open_backend(name: str, spec: ModelSpec, config: Resolved) -> Backend:
    """Open a backend by name; config.deterministic: behind what cuts its steps into tiles of one shape. Imports only
    that backend's libraries.

    Raises ConfigError naming what is missing.
    """
    if config.deterministic:
        from backends.api.tiled import Tiled

        return Tiled(spec, config, lambda spec, inner: _open(name, spec, inner))
    return _open(name, spec, config)


def _open(name: str, spec: ModelSpec, config: Resolved) -> Backend:
    try:
        if name == "jax":
            from backends.jax.backend import JaxBackend

            return JaxBackend(spec, config)
        if name == "torch":
            from backends.torch.backend import TorchBackend

            return TorchBackend(spec, config)
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
