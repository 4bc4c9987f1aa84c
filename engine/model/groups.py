"""Cache groups: layers that keep the same positions share page ids. A group's kind is data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from engine.model.spec import ModelSpec

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """Layers whose cache is addressed by one page table per slot.

    kind: "full" keeps every position, "window" the last `window` of them, "state" one recurrent state (page = 0).
    page: tokens per page. role: "target" or "draft" (a drafter's cache may lower acceptance, never change output).
    layers: indices into ModelSpec.layers. kv_heads, head_dim: shape of one token's keys in one layer.
    """

    kind: Literal["full", "window", "state"]
    page: int
    role: Literal["target", "draft"] = "target"
    window: int = 0
    layers: tuple[int, ...] = ()
    kv_heads: int = 0
    head_dim: int = 0

    def page_bytes(self, dtype: str) -> int:
        """Bytes of one page over all layers of the group, keys and values, on one device that holds all heads."""
        return self.page * len(self.layers) * 2 * self.kv_heads * self.head_dim * ITEMSIZE[dtype]


def cache_groups(spec: ModelSpec, page: int) -> tuple[CacheGroup, ...]:
    """The groups of a model, in the order of their first layer. page: tokens per page."""
    members: dict[tuple[int, int, int], list[int]] = {}
    for i, layer in enumerate(spec.layers):
        m = layer.mixer
        members.setdefault((m.window or 0, m.kv_heads, m.head_dim), []).append(i)
    return tuple(
        CacheGroup(
            kind="window" if window else "full",
            page=page,
            window=window,
            layers=tuple(layers),
            kv_heads=kv_heads,
            head_dim=head_dim,
        )
        for (window, kv_heads, head_dim), layers in members.items()
    )


class Place(NamedTuple):
    """Where a layer's cache lies: the cache group, and the layer's rank in it (a traced number inside a scan)."""

    group: int
    rank: Any


def places(spec: ModelSpec) -> tuple[Place, ...]:
    """The place of each layer."""
    groups = cache_groups(spec, 1)
    return tuple(
        next(Place(g, group.layers.index(i)) for g, group in enumerate(groups) if i in group.layers)
        for i in range(len(spec.layers))
    )
