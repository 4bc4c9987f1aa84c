"""Chips that are compiled for without having one: their facts, in one place, and how a target is written.

A target is "cpu", "tpu:v6e:2x4" (chip and topology), "tpu:v6e" (a chip alone, for `radixmesh plan`), "cuda:sm_90" or
"rocm:gfx942", or a card of such an architecture, "cuda:sm_90:h200".
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from engine.errors import ConfigError
from engine.resolve.facts import Device
from engine.resolve.memory import GIB

MOST = 0.92
"""Of a device's memory, what a program may take at its peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """Facts of one device, which is a chip or, where `devices` is 2, half of one.

    kind: as jax names it. dims: of a topology. memory: bytes that a program may use, bandwidth: bytes a second of it.
    flops: dtype -> operations a second. width: operations a cycle in bfloat16, so that the clock follows.
    ici: bytes a second to and from other chips, all links and both directions. vmem: bytes of each core's.
    source: where the figures are published.
    """

    name: str
    kind: str
    dims: int
    devices: int
    memory: int
    bandwidth: float
    flops: Mapping[str, float]
    width: int
    ici: float
    vmem: int
    source: str

    @property
    def clock(self) -> float:
        """Cycles a second: the published peak over the matrix units' operations a cycle."""
        return self.flops["bfloat16"] / self.width


def _chip(name: str, kind: str, dims: int, devices: int, page: str, **published: float) -> Chip:
    """A chip from its published figures, which are of whole chips: TFLOP/s, GB/s, GiB."""

    def each(key: str, unit: float) -> float:
        return published[key] * unit / devices

    return Chip(
        name=name,
        kind=kind,
        dims=dims,
        devices=devices,
        memory=int(published["memory"] * GIB),
        bandwidth=each("bandwidth", 1e9),
        flops={dtype: each(dtype, 1e12) for dtype in ("bfloat16", "int8", "float8") if dtype in published}
        | {"float32": each("bfloat16", 1e12) / 6},  # six bfloat16 products make an exact one
        width=int(published["width"]),
        ici=each("ici", 1e9),
        vmem=int(published["vmem"]) << 20,
        source=f"https://docs.cloud.google.com/tpu/docs/{page}",
    )


CHIPS: Mapping[str, Chip] = {
    c.name: c
    for c in (
        _chip("v5e", "TPU v5 lite", 2, 1, "v5e", memory=15.75, bandwidth=819, bfloat16=197, int8=393, ici=400,
              width=4 * 2 * 128**2, vmem=128),
        _chip("v5p", "TPU v5", 3, 1, "v5p", memory=95.74, bandwidth=2765, bfloat16=459, int8=918, ici=1200,
              width=8 * 2 * 128**2, vmem=64),
        _chip("v6e", "TPU v6 lite", 2, 1, "v6e", memory=31.25, bandwidth=1638, bfloat16=918, int8=1836, ici=800,
              width=2 * 4 * 256**2, vmem=128),
        _chip("tpu7x", "TPU7x", 3, 2, "tpu7x", memory=94.75, bandwidth=7380, bfloat16=2307, float8=4614, ici=1200,
              width=2 * 4 * 256**2, vmem=64),
    )
}  # fmt: skip
"""Name -> chip. memory is what XLA leaves to programs, as its out-of-memory error says (libtpu 0.0.42.1), of one
device; width is matrix units x their operations a cycle; vmem as jax.experimental.pallas.tpu.get_tpu_info has it."""
GPUS: Mapping[str, tuple[str, ...]] = {
    "cuda": ("sm_80", "sm_89", "sm_90", "sm_100"),
    "rocm": ("gfx942", "gfx950"),
}
"""Platform -> architectures of GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU that need not be here. memory: bytes, as its maker's data sheet has them."""

    name: str
    arch: str
    memory: int


CARDS = tuple(
    Card(name=name, arch=arch, memory=size * 10**9)
    for name, arch, size in (
        ("a100", "sm_80", 80),
        ("l40s", "sm_89", 48),
        ("h100", "sm_90", 80),
        ("h200", "sm_90", 141),
        ("b200", "sm_100", 180),
        ("mi300x", "gfx942", 192),
        ("mi325x", "gfx942", 256),
        ("mi355x", "gfx950", 288),
    )
)
"""The first of an architecture is what it is known by. A data sheet's GB are taken as 10**9 bytes: a card has some more
(an H200 was found to have 139.8 GiB, not 131.3), of which a driver and a context take their part."""
HOST = (2, 2, 1)
"""Chips of a host, along each side of a topology: the smallest that can be described."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is compiled for. chip: of a TPU, or None; arch: of a GPU, or ""; card: where one is named; shape:
    chips along each side, or ()."""

    platform: str
    chip: Chip | None = None
    arch: str = ""
    card: Card | None = None
    shape: tuple[int, ...] = ()

    @property
    def topology(self) -> str:
        """As libtpu names it: "v6e:2x4"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}" if self.chip else ""

    @property
    def devices(self) -> int:
        """Devices of the topology."""
        return prod(self.shape) * self.chip.devices if self.chip else 1

    def __str__(self) -> str:
        card = self.card.name if self.card else ""
        return ":".join(filter(None, (self.platform, self.topology.rstrip(":") or self.arch, card)))

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a target. Raises ConfigError with the nearest name."""
        platform, _, rest = text.strip().partition(":")
        if platform == "cpu" and not rest:
            return cls(platform="cpu")
        if platform in GPUS:
            arch, _, name = rest.partition(":")
            if arch not in GPUS[platform]:
                raise _unknown("architecture", arch, GPUS[platform], f"{platform}:{GPUS[platform][0]}")
            cards = {c.name: c for c in CARDS if c.arch == arch}
            if name and name not in cards:
                raise _unknown(f"card of {arch}", name, tuple(cards), f"{platform}:{arch}:{next(iter(cards))}")
            return cls(platform=platform, arch=arch, card=cards.get(name))
        if platform != "tpu":
            raise _unknown("platform", platform, ("cpu", "tpu", *GPUS), "tpu:v6e:2x4")
        name, _, shape = rest.partition(":")
        if name not in CHIPS:
            raise _unknown("chip", name, tuple(CHIPS), "tpu:v6e:2x4")
        return cls(platform="tpu", chip=CHIPS[name], shape=_shape(CHIPS[name], shape) if shape else ())

    def gpu(self, backend: str, count: int) -> Device:
        """`count` GPUs of the target as engine.resolve sees them."""
        card = self.card or next(c for c in CARDS if c.arch == self.arch)
        return Device(
            backend=backend,
            why="target",
            platform="gpu",
            kind=f"{card.name.upper()} ({self.arch}, by its data sheet)",
            count=count,
            memory_bytes=card.memory,
            bf16=True,
        )

    def device(self) -> Device:
        """The device as engine.resolve sees it. Raises ConfigError where the target names no device of a TPU."""
        if self.chip is None or not self.shape:
            raise ConfigError(f"target {self}: is no TPU with a topology, such as tpu:v6e:2x4", field="target")
        return Device(
            backend="jax",
            why="target",
            platform="tpu",
            kind=self.chip.kind,
            count=self.devices,
            memory_bytes=self.chip.memory,
            bf16=True,
        )


def known(kind: str) -> Chip | None:
    """The chip that jax calls so."""
    return next((c for c in CHIPS.values() if c.kind == kind), None)


def smallest(chip: Chip, devices: int) -> Target:
    """The smallest topology of a chip that has so many devices: sides double in turn."""
    shape = list(HOST[: chip.dims])
    while prod(shape) * chip.devices < devices:
        side = min(range(chip.dims), key=lambda i: (shape[i], -i))
        shape[side] *= 2
    return Target(platform="tpu", chip=chip, shape=tuple(sorted(shape)) if chip.dims == 2 else tuple(shape))


def _shape(chip: Chip, text: str) -> tuple[int, ...]:
    sides = text.split("x")
    example = smallest(chip, 8).topology
    if not all(s.isascii() and s.isdigit() and int(s) > 0 for s in sides) or len(sides) != chip.dims:
        raise ConfigError(
            f"target: topology {text!r} of {chip.name}: give {chip.dims} sides, such as {example}", field="target"
        )
    shape = tuple(map(int, sides))
    for side, host in zip(shape, HOST, strict=False):
        if side % host:
            raise ConfigError(
                f"target: topology {text} of {chip.name}: whole hosts of {'x'.join(map(str, HOST[: chip.dims]))} chips "
                f"must make it, such as {example}",
                field="target",
            )
    return shape


def _unknown(what: str, name: str, names: tuple[str, ...], example: str) -> ConfigError:
    near = difflib.get_close_matches(name, names, 1, cutoff=0.4)
    said = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(names)}."
    return ConfigError(f"target: unknown {what} {name!r}{said} Write it as {example}", field="target")
