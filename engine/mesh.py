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
    "pair": None,
}
"""Logical axis of a parameter -> mesh axis that splits it. None = replicated. pair: keys, values."""
REPEATED = ("kv_heads",)
"""Axes whose entries are repeated where they are fewer than the devices: a device holds the one that it needs."""
PADDED = ("vocab",)
"""Axes that are padded with zeros where the mesh does not divide them."""


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


def parts(axis: str, mesh: MeshSpec) -> int:
    """Parts that a mesh splits a logical axis into."""
    rule = RULES[axis]
    return 1 if rule is None else int(getattr(mesh, rule))


def share(size: int, axis: str, mesh: MeshSpec) -> int:
    """Entries of a dimension of `size` that each device holds, where the dimension has this logical axis.

    Raises ConfigError when the mesh axis does not divide it. Two kinds of dimension need not be divided: of REPEATED
    ones, several devices hold the same entry where there are more devices than entries; PADDED ones are rounded up,
    and the last devices hold fewer real entries.
    """
    count = parts(axis, mesh)
    if axis in PADDED:
        return -(-size // count)
    if axis in REPEATED and size < count and count % size == 0:
        return 1
    if size % count:
        neither = " and is not divided by it" if axis in REPEATED and size < count else ""
        raise ConfigError(f"mesh: {RULES[axis]}={count} does not divide {axis}={size}{neither}", field="mesh")
    return size // count


def shard_shape(shape: Sequence[int], axes: Sequence[str], mesh: MeshSpec) -> tuple[int, ...]:
    """The shape of a parameter's part on a device, padding included. Raises ConfigError as `share` does."""
    return tuple(share(size, axis, mesh) for size, axis in zip(shape, axes, strict=True))


def shard_slices(
    shape: Sequence[int], axes: Sequence[str], mesh: MeshSpec, coordinate: Mapping[str, int]
) -> tuple[slice, ...]:
    """The part of a parameter that the device at `coordinate` (mesh axis -> index) holds, without padding.

    shape, axes: the parameter's sizes and logical axes, one name a dimension. Raises ConfigError as `share` does.
    """
    out = []
    for size, axis in zip(shape, axes, strict=True):
        rule, held = RULES[axis], share(size, axis, mesh)
        at = 0 if rule is None else coordinate.get(rule, 0)
        start = at * size // parts(axis, mesh) if axis in REPEATED else at * held
        out.append(slice(min(start, size), min(start + held, size)))
    return tuple(out)
