"""What numbers are kept in: dtype, cache_dtype, scales, quantise, activations."""

from __future__ import annotations

from dataclasses import replace

from engine.config import Config
from engine.errors import ConfigError
from engine.mesh import MeshSpec, shard_shape
from engine.model.narrow import stored_as
from engine.model.params import params
from engine.model.quant import BY
from engine.model.spec import EIGHT, ModelSpec
from engine.resolve.facts import Decision, Device
from engine.resolve.memory import weight_bytes

LANES = 128
"""Numbers of a line of a TPU's registers."""


def decide_numbers(config: Config, spec: ModelSpec, mesh: MeshSpec, device: Device) -> list[Decision]:
    quantised = _quantise(config, spec, mesh, device)
    return [
        *_dtypes(config, spec, device),
        _scales(config),
        _unaligned(quantised, spec, mesh, device),
        _activations(config, quantised.value, device),
    ]


def _dtypes(config: Config, spec: ModelSpec, device: Device) -> list[Decision]:
    asked, cache = config.model.dtype, config.cache.dtype
    if asked != "auto":
        dtype, why = asked, "model.dtype"
    elif spec.dtype == "float32":
        dtype, why = "float32", "the checkpoint's"
    elif device.platform == "cpu":
        dtype, why = "float32", f"{spec.dtype} in the checkpoint; on a CPU float32 is exact, the same on every backend"
    elif not device.bf16:
        dtype, why = "float32", f"{device.kind} has no bfloat16"
    elif spec.dtype == "bfloat16":
        dtype, why = "bfloat16", "the checkpoint's"
    else:
        dtype, why = "bfloat16", f"{spec.dtype} in the checkpoint, which is not built: the same size, wider range"
    if cache == "auto":
        return [
            Decision(field="dtype", value=dtype, why=why),
            Decision(field="cache_dtype", value=dtype, why="as the weights"),
        ]
    return [
        Decision(field="dtype", value=dtype, why=why),
        Decision(field="cache_dtype", value=cache, why="cache.dtype" + (": 1 byte a number" if cache in EIGHT else "")),
    ]


def _scales(config: Config) -> Decision:
    """Where a cache of 8 bits has its scales from."""
    asked, dtype = config.cache.scales, config.cache.dtype
    if dtype not in EIGHT:
        if asked is not None:
            raise ConfigError(
                f"cache.scales: a cache has scales in {' or '.join(EIGHT)}; set cache.dtype, or leave it out",
                field="cache.scales",
            )
        return Decision(field="scales", value="", why="none: keys and values are kept as they are")
    if asked is not None:
        return Decision(field="scales", value=asked, why="cache.scales: the largest of each layer and head")
    if config.model.weights == "dummy":
        return Decision(field="scales", value="", why="auto: dummy weights have one that suits them")
    if dtype == "int8":
        raise ConfigError(
            "cache.scales: int8 needs the largest key and value of each layer and head: radixmesh calibrate "
            "--model DIR --out FILE, then cache.scales = FILE; or use fp8",
            field="cache.scales",
        )
    return Decision(field="scales", value="", why="auto: the checkpoint's, 1 where it has none")


def _quantise(config: Config, spec: ModelSpec, mesh: MeshSpec, device: Device) -> Decision:
    """Which numbers the layers' matrices are kept in."""
    asked = config.model.quantise
    kind = stored_as(spec.narrow) if asked == "auto" and spec.narrow else "none" if asked == "auto" else asked
    why = "model.quantise" if asked != "auto" else "auto, as in the checkpoint" if spec.narrow else "auto"
    if kind != "none" and asked == "auto":
        try:
            weight_bytes(spec, "bfloat16", mesh, kind)
        except ConfigError:  # which a narrower mesh would not need
            return Decision(field="quantise", value="none", why=f"auto: {mesh} would cut blocks apart")
    if kind == "none":
        return Decision(field="quantise", value="none", why=f"{why}: as wide as activations")
    each = "output" if BY[kind] == "row" else "128 x 128"
    why += f": matrices of attention and feed-forward, a scale for each {each}"
    if device.backend == "reference":
        why += "; the reference computes with what they stand for, in float32"
    return Decision(field="quantise", value=kind, why=why)


def _unaligned(made: Decision, spec: ModelSpec, mesh: MeshSpec, device: Device) -> Decision:
    """The same, which says of experts that no kernel of a TPU reads: models_jax/experts.py leaves them to XLA."""
    if device.backend != "jax" or device.platform != "tpu":
        return made
    experts = (p for p in params(spec).values() if p.axes[0] == "experts" and len(p.axes) == 3)
    odd = sorted({n for p in experts if (n := shard_shape(p.shape, p.axes, mesh)[-1]) % LANES})
    if not odd:
        return made
    why = (
        f"; experts of {' and '.join(map(str, odd))} inputs on a device, no multiple of {LANES}, are multiplied by XLA"
    )
    cost = "" if made.value == "none" else ", which widens them all in each step: a smaller mesh or none may be faster"
    return replace(made, why=made.why + why + cost)


def _activations(config: Config, kind: str, device: Device) -> Decision:
    """What rows are multiplied with quantised matrices in."""
    asked = config.model.activations
    reasons = {
        f"matrices are {kind}": not kind.startswith("fp8"),
        f"{device.backend} on a {device.platform} widens": (device.backend, device.platform) != ("torch", "gpu"),
        "backend.deterministic": config.backend.deterministic,
    }
    why = next((reason for reason, holds in reasons.items() if holds), "")
    if asked == "fp8" and why:
        raise ConfigError(f"model.activations = fp8: {why}; leave it out", field="model.activations")
    said = "auto" if asked == "auto" else "model.activations"
    if asked == "wide" or why:
        return Decision(field="activations", value="wide", why=said if asked == "wide" else f"auto: {why}")
    why = f"{said}: many rows times fp8 matrices, each row with a scale of its own, where the GPU multiplies fp8"
    return Decision(field="activations", value="fp8", why=why)
