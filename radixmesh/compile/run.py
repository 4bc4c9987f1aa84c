"""From a configuration and a target to what was decided for it, and to a record of every program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from backends import target as compilers
from backends.probe import probe
from engine.config import Config
from engine.errors import BackendLost, ConfigError
from engine.mesh import MeshSpec
from engine.model.registry import read_spec
from engine.model.spec import ModelSpec, fit
from engine.resolve import resolve
from engine.resolve.cache import SHARE
from engine.resolve.facts import Device
from engine.resolve.memory import local_groups, weight_bytes
from engine.run import wire
from engine.run.start import Decided
from engine.target import GIB, GPUS, Target, smallest

SIZES = tuple(1 << i for i in range(11))
"""Tensor shards that are tried."""
ROOM = ("cache.fraction", "cache.tokens")
"""Keys that the resolver names where memory is short."""


def decide(config: Config, target: Target, default: Path) -> Decided:
    """What a start on the target would decide. Raises ConfigError: a mesh that doesn't go into the topology, a model
    that doesn't fit, by how much, and the smallest mesh that holds it."""
    path = Path(config.model.path) if config.model.path is not None else default
    return settle(config, read_spec(path), path, target)


def settle(config: Config, spec: ModelSpec, path: Path, target: Target) -> Decided:
    """`decide` of a model that is read."""
    device = device_of(config, target)
    mesh = MeshSpec(dp=config.mesh.dp, pp=config.mesh.pp, tp=config.mesh.tp, ep=config.mesh.ep)
    if target.chip and device.count % mesh.size:
        raise ConfigError(
            f"mesh: the {device.count} devices of {target} are not divided by {mesh}; "
            f"give a mesh of {', '.join(str(n) for n in SIZES if device.count % n == 0)}",
            field="mesh",
        )
    try:
        resolved, decisions = resolve(config, spec, device)
    except ConfigError as error:
        if target.chip is None or error.field not in ROOM:
            raise
        raise ConfigError(_short(config, spec, target, device, mesh, error), field=error.field) from error
    return Decided(path=path, spec=fit(spec, resolved.max_len), resolved=resolved, decisions=tuple(decisions))


def device_of(config: Config, target: Target) -> Device:
    """The device that is decided for. Raises ConfigError for a backend that doesn't run there."""
    name, mesh = config.backend.name, config.mesh
    if target.platform in GPUS:
        if name not in ("auto", "torch", "jax"):
            raise ConfigError(f"backend: {name} does not run on {target}; use torch or jax", field="backend")
        if name != "jax":
            compilers.check(target)
        return target.gpu("torch" if name == "auto" else name, mesh.dp * mesh.pp * mesh.tp * mesh.ep)
    if name not in ("auto", "jax"):
        raise ConfigError(f"backend: {name} runs no compiled programs on {target}; use jax", field="backend")
    return target.device() if target.platform == "tpu" else probe("jax", "cpu")


def _short(config: Config, spec: ModelSpec, target: Target, device: Device, mesh: MeshSpec, error: ConfigError) -> str:
    """In words: by how much a model is too large for a mesh, and which holds it."""
    assert target.chip is not None
    dtype = "float32" if config.model.dtype == "float32" else "bfloat16"
    weights = weight_bytes(spec, dtype, mesh)
    page = sum(g.page_bytes(dtype) for g in local_groups(spec, config.cache.page or 16, mesh))
    room = int((config.cache.fraction or SHARE["tpu"]) * device.memory_bytes)
    over = weights + page - room
    said = (
        f"target {target}: {weights / GIB:.2f} GiB of weights a device and a page of cache are {over / GIB:.2f} GiB "
        f"more than the {room / GIB:.2f} GiB that are left to them ({mesh})"
    )
    said = said if over > 0 else str(error)
    holds = next((n for n in SIZES if n > mesh.size and holds_model(config, spec, target, n)), None)
    if holds is None:
        return f"{said}; no mesh of this model's heads on {target.chip.name} holds it"
    return f"{said}; the smallest mesh that holds it: tp={holds} on tpu:{smallest(target.chip, holds).topology}"


def holds_model(config: Config, spec: ModelSpec, target: Target, tp: int) -> bool:
    """Whether so many devices of a chip hold a model."""
    assert target.chip is not None
    device = smallest(target.chip, tp).device()
    try:
        resolve(replace(config, mesh=replace(config.mesh, tp=tp)), spec, device)
    except ConfigError:
        return False
    return True


def records(decided: Decided, target: Target, only: str = "", bundle: str = "") -> Iterator[dict[str, Any]]:
    """What backends.jax.target.examine tells, from a process of its own. Raises ConfigError as it refuses, BackendLost
    where it died; by a signal twice, since libtpu's compiler does so once in some hundred processes, and not again."""
    compilers.check(target)
    told = set[tuple[Any, ...]]()
    for last in (False, True):
        try:
            for record in _compiled(decided, target, only, bundle):
                key = (record["program"], record["layers"]) if "program" in record else tuple(record)
                if key not in told:
                    told.add(key)
                    yield record
            return
        except BackendLost as lost:
            if last or not isinstance(lost.__cause__, KilledError):
                raise


class KilledError(Exception):
    """A signal ended a process."""


def _compiled(decided: Decided, target: Target, only: str, bundle: str) -> Iterator[dict[str, Any]]:
    """`records` of one process."""
    asked = {"topology": target.topology, "only": only, "bundle": bundle}
    request = json.dumps(asked).encode() + b"\n" + wire.encode(wire.Open(spec=decided.spec, config=decided.resolved))
    with TemporaryFile() as said, TemporaryFile() as given:
        given.write(request)
        given.seek(0)
        with subprocess.Popen(
            [sys.executable, "-m", "radixmesh.compile.child"],
            env=os.environ | compilers.SETTINGS,
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        ) as child:
            assert child.stdout is not None
            try:
                for line in child.stdout:
                    record = json.loads(line)
                    if "refused" in record:
                        raise ConfigError(record["refused"], field=record["field"])
                    yield record
            except BaseException:
                child.kill()
                raise
        if child.returncode:
            said.seek(0)
            last = said.read().decode(errors="replace").strip().splitlines()[-1:]
            why = KilledError(f"signal {-child.returncode}") if child.returncode < 0 else None
            said_last = f"target {target}: the compiling process ended with {child.returncode}: {''.join(last)}"
            raise BackendLost(said_last) from why
