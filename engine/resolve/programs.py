"""What runs the steps, compiled how: stack, programs, bundle, ready_early of jax; graphs, cascade of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.config import Config
from engine.errors import ConfigError
from engine.model.spec import ModelSpec
from engine.resolve.facts import Decision, Device
from engine.resolve.memory import loaded_bytes

SMALL = 32 << 20
"""Bytes of weights that a scan on a CPU may copy in each step."""
COPIED = ("TPU7x",)
"""Kinds of TPUs that copy stacked bfloat16 weights (docs/decisions/0017-compiled-without-the-chip.md)."""


def decide_programs(config: Config, spec: ModelSpec, device: Device, values: dict[str, Any]) -> list[Decision]:
    """values: what was decided before, by field."""
    bundle = config.backend.jax.bundle
    return [
        _stack(config, spec, device, values),
        _programs(config),
        Decision(
            field="bundle",
            value=bundle or "",
            why="backend.jax.bundle" if bundle else "auto: programs are compiled",
        ),
        _early(config, device),
        _graphs(config, spec, device),
        _cascade(config, spec, device),
    ]


def _stack(config: Config, spec: ModelSpec, device: Device, values: dict[str, Any]) -> Decision:
    asked, dtype, quantise = config.backend.jax.stack, values["dtype"], values["quantise"]
    if asked != "auto":
        return Decision(field="stack", value=asked, why="backend.jax.stack")
    if (
        device.platform == "cpu"
        and loaded_bytes(
            spec, backend="jax", dtype=dtype, cache_dtype=values["cache_dtype"], quantise=quantise, mesh=values["mesh"]
        )
        <= SMALL
    ):
        why = f"weights of up to {SMALL >> 20} MiB are copied soon, and a CPU compiles a scan in half the time"
        return Decision(field="stack", value="scan", why=why)
    if device.platform != "tpu":
        return Decision(field="stack", value="list", why="off a TPU a scan copies each layer's weights")
    if device.kind in COPIED and dtype == "bfloat16" and quantise == "none":
        return Decision(
            field="stack", value="list", why=f"on a {device.kind} a scan copies stacked {dtype} weights in each step"
        )
    return Decision(field="stack", value="scan", why="on a TPU stacked layers are scanned without copies")


def _programs(config: Config) -> Decision:
    asked = config.backend.jax.cache
    if asked == "off":
        return Decision(field="programs", value="", why="backend.jax.cache")
    if asked != "auto":
        return Decision(field="programs", value=asked, why="backend.jax.cache")
    try:
        home = Path.home()
    except RuntimeError:
        return Decision(field="programs", value="", why="auto: the user has no home folder")
    return Decision(
        field="programs", value=str(home / ".cache" / "radixmesh" / "jax"), why="auto: the user's cache folder"
    )


def _early(config: Config, device: Device) -> Decision:
    """Whether only jax's first programs are waited for; the others have none to wait for."""
    asked = config.sched.ready_early
    if asked and device.backend != "jax":
        return Decision(field="ready_early", value=False, why=f"{device.backend} compiles no programs ahead")
    return Decision(field="ready_early", value=asked, why="sched.ready_early")


def _graphs(config: Config, spec: ModelSpec, device: Device) -> Decision:
    """Whether torch captures small steps."""

    asked = config.backend.torch.graphs

    def no(why: str) -> Decision:
        return Decision(field="graphs", value="", why=why)

    if (device.backend, device.platform) != ("torch", "gpu"):
        return no("only torch on a GPU has graphs to capture")
    if asked == "off":
        return no("backend.torch.graphs")
    if config.backend.deterministic and any(layer.mixer.window for layer in spec.layers):
        why = "deterministic attention over a window gathers its pages, call by call"
        if asked == "on":
            raise ConfigError(f'backend.torch.graphs: can\'t be "on": {why}', field="backend.torch.graphs")
        return no(f"auto: {why}")
    if asked == "on":
        why = "steps of few tokens are captured at warm-up, in pieces where something must run between"
        return Decision(field="graphs", value="pieces", why=f"backend.torch.graphs: {why}")
    return Decision(field="graphs", value="whole", why="auto: steps of few tokens are captured at warm-up and replayed")


def _cascade(config: Config, spec: ModelSpec, device: Device) -> Decision:
    """Whether torch reads once, for all rows of a group, what their prompts have in common."""
    asked = config.backend.torch.cascade

    def no(why: str) -> Decision:
        if asked == "on":
            raise ConfigError(f'backend.torch.cascade: can\'t be "on": {why}', field="backend.torch.cascade")
        return Decision(field="cascade", value="off", why=f"auto: {why}")

    mixers = [layer.mixer for layer in spec.layers if layer.mixer.window is None]
    full = {mixer.q_heads // mixer.kv_heads for mixer in mixers}
    if device.backend != "torch":
        return Decision(field="cascade", value="off", why="only torch reads shared prefixes once for several rows")
    if asked == "off":
        return Decision(field="cascade", value="off", why="backend.torch.cascade")
    if config.backend.deterministic:
        return no("deterministic attention reduces over each row's own blocks")
    if len(full) != 1:
        return no(f"{len(full)} kinds of layers see all of a prompt; it must be one")
    if asked == "on":
        return Decision(field="cascade", value="on", why="backend.torch.cascade")
    if device.platform != "gpu":
        return no("a CPU gains nothing by it")
    return Decision(field="cascade", value="auto", why="auto: where a step's rows share so much that it pays")
