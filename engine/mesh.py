"""One mesh grammar for every backend: "dp=2,pp=2,tp=4[,ep=8]", and the rules from logical axes to mesh axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.errors import ConfigError

AXES = ("dp", "pp", "tp", "ep")

RULES: Mapping[str, str | None] = {
    "q_heads": "tp",
    "kv_heads": "tp",
    "ffn": "tp",
    "experts": None,
    "vocab": "tp",
    "hidden": None,
    "head": None,
}
"""Logical axis of a parameter -> mesh axis that splits it. None = replicated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshSpec:
    """How many devices stand along each axis.

    dp: data (and attention) replicas, pp: pipeline stages, tp: tensor shards, ep: expert shards.
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def size(self) -> int:
        """Devices in the mesh. Experts live on the devices of dp and tp, so ep adds none."""
        return self.dp * self.pp * self.tp

    def __str__(self) -> str:
        return ",".join(f"{a}={getattr(self, a)}" for a in AXES if getattr(self, a) > 1) or "tp=1"

    @classmethod
    def parse(cls, text: str) -> MeshSpec:
        """Read "dp=2,tp=4"; the empty string is one device. Raises ConfigError naming the axis."""
        sizes: dict[str, int] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            axis, _, size = part.partition("=")
            axis = axis.strip()
            if axis not in AXES:
                raise ConfigError(f"mesh: unknown axis {axis!r}; the axes are {', '.join(AXES)}", field="mesh")
            if axis in sizes:
                raise ConfigError(f"mesh: axis {axis} is given twice", field="mesh")
            if not size.strip().isascii() or not size.strip().isdigit() or int(size) < 1:
                raise ConfigError(f"mesh: {axis} must be a positive integer, not {size.strip()!r}", field="mesh")
            sizes[axis] = int(size)
        return cls(**sizes)


def shard_slices(
    shape: Sequence[int], axes: Sequence[str], mesh: MeshSpec, coordinate: Mapping[str, int]
) -> tuple[slice, ...]:
    """The part of a parameter that the device at `coordinate` (mesh axis -> index) holds.

    shape, axes: the parameter's sizes and logical axes, one name a dimension.
    Raises ConfigError when a mesh axis does not divide a dimension that it splits.
    """
    out = []
    for size, axis in zip(shape, axes, strict=True):
        rule = RULES[axis]
        parts = 1 if rule is None else int(getattr(mesh, rule))
        if size % parts:
            raise ConfigError(f"mesh: {rule}={parts} does not divide {axis}={size}", field="mesh")
        step = size // parts
        start = 0 if rule is None else coordinate.get(rule, 0) * step
        out.append(slice(start, start + step))
    return tuple(out)
