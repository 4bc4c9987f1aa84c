"""Compiling for a device that is not here: what must be installed and set, and which backend does it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import requires
from typing import Any

from engine.config import Resolved
from engine.errors import ConfigError
from engine.installed import version
from engine.model.spec import ModelSpec
from engine.target import GPUS, Target

SETTINGS: Mapping[str, str] = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # no cloud is asked what machine this is
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu's lock is for real chips
}
"""Environment of the process that compiles: libtpu and jax read it when they start."""

EXTRA = {"cuda": "cuda", "rocm": "rocm"}
"""Platform of a GPU -> the extra of this package that brings its compiler."""


def check(target: Target) -> None:
    """Refuse, in one line, a target that can't be compiled for here. Raises ConfigError."""
    if target.platform in GPUS:
        for name in ("torch", "triton"):
            if not version(name):
                raise ConfigError(
                    f"target {target}: {name} is not installed: pip install 'radixmesh[{EXTRA[target.platform]}]'",
                    field="target",
                )
    if target.platform == "tpu":
        check_pair(version("jax"), version("libtpu"), wanted(requires("jax") or []))


def wanted(needs: list[str]) -> str:
    """The libtpu that a jax was made with, as its own metadata has it: "0.0.42.*"; "" where it says nothing."""
    found = next((m for line in needs if (m := re.match(r"libtpu\s*==\s*([\w.*]+)", line))), None)
    return found[1] if found else ""


def check_pair(jax: str, libtpu: str, goes: str) -> None:
    """Refuse a libtpu that is missing (""), or is not the one that jax goes with."""
    install = f"jax {jax} goes with libtpu {goes or 'of its own extra'}: pip install 'jax[tpu]=={jax}'"
    if not libtpu:
        raise ConfigError(f"target: libtpu is not installed; {install}", field="target")
    if goes and not re.fullmatch(re.escape(goes).replace(r"\*", ".*"), libtpu):
        raise ConfigError(f"target: libtpu {libtpu} is the wrong version; {install}", field="target")


def versions() -> dict[str, str]:
    """Of the compilers."""
    return {name: found for name in ("jax", "jaxlib", "libtpu") if (found := version(name))}


def examine(spec: ModelSpec, config: Resolved, topology: str, only: str, bundle: str) -> Iterator[dict[str, Any]]:
    """backends.jax.target.examine, in a process that was started with SETTINGS."""
    from backends.jax import target

    return target.examine(spec, config, topology, only, bundle)


def examine_gpu(spec: ModelSpec, config: Resolved, arch: str) -> Iterator[dict[str, Any]]:
    """backends.torch.target.examine, in this process."""
    from backends.torch import target

    return target.examine(spec, config, arch)
