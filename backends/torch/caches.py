"""What the device keeps between steps: the caches of keys and values, and what it knows of each slot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from backends.api.limits import Limits
from backends.api.step import I32
from backends.torch.params import DTYPES as WIDE
from engine.mesh import MeshSpec, share

DTYPES = WIDE | {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What keys and values may be kept in."""
MOST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest number of a cache of 8 bits."""


def narrow(kv: torch.Tensor, dtype: torch.dtype, inverses: torch.Tensor | None) -> torch.Tensor:
    """kv [T, 2, kv_heads, head_dim] as the cache holds it.

    inverses float32[2, kv_heads]: of the scales, where it has 8 bits; times these in float32, clamped, rounded to the
    nearest, ties to even. NaN stays what it is in fp8, and becomes 0 in int8, which has none.
    """
    if inverses is None:
        return kv.to(dtype)
    ratio = (kv.float() * inverses[..., None]).clamp_(-MOST[dtype], MOST[dtype])
    if dtype == torch.int8:
        ratio = ratio.nan_to_num_(nan=0.0).round_()
    return ratio.to(dtype)


def widen(held: torch.Tensor, dtype: torch.dtype, scales: torch.Tensor | None) -> torch.Tensor:
    """What was read of a cache, [..., 2, kv_heads, head_dim], as numbers of `dtype`. scales float32[2, kv_heads]: where
    it has 8 bits."""
    if scales is None:
        return held.to(dtype)
    return (held.float() * scales[..., None]).to(dtype)


def put(store: torch.Tensor, at: torch.Tensor, held: torch.Tensor) -> None:
    """Write entries int64[T] of one layer's cache. torch indexes no fp8: its bytes are written."""
    if store.dtype == torch.float8_e4m3fn:
        store, held = store.view(torch.uint8), held.view(torch.uint8)
    store.index_copy_(0, at, held)


def take(store: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Read entries int64[N] of one layer's cache."""
    if store.dtype == torch.float8_e4m3fn:
        return store.view(torch.uint8).index_select(0, at).view(store.dtype)
    return store.index_select(0, at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caches:
    """Caches, and int64 state per slot; changed in place.

    groups: of each cache group [layers, pages*page + 1, 2, kv_heads, head_dim], 2 = key and value; token t of page p
    lies at p*page + t. The last entry is zero and never written: what a row must not see is read there, so that
    whatever stands in unused parts of the cache, NaN too, reaches nobody.
    length [slots + 1]: cached positions. last [slots + 1]: last accepted token. tables: of each group [slots + 1,
    max_row_pages]. The last slot is that of padding.
    counts int32[slots, V]: what penalties look at, as backends.api.seats.tally has it; [0, V] where there are none.
    """

    groups: tuple[torch.Tensor, ...]
    length: torch.Tensor
    last: torch.Tensor
    tables: tuple[torch.Tensor, ...]
    counts: torch.Tensor

    def largest(self) -> list[NDArray[np.float32]]:
        """Of each group the largest magnitudes that its cache, which has not 8 bits, holds: float32[layers, 2,
        kv_heads]."""
        return [torch.maximum(g.amax((1, 4)), -g.amin((1, 4))).float().cpu().numpy() for g in self.groups]

    def copy(self, limits: Limits, copies: I32) -> None:
        """Page to page int32[C, 4], (group, shard, source, target), in order, in every layer."""
        for g, _, source, target in copies.tolist():
            page, store = limits.groups[g].page, self.groups[g]
            store[:, target * page : (target + 1) * page] = store[:, source * page : (source + 1) * page]

    def clear(self) -> None:
        """Empty, in the same memory, which steps that were captured know."""
        for each in (*self.groups, self.length, self.last, *self.tables, self.counts):
            each.zero_()


def make(limits: Limits, dtype: str, device: torch.device, mesh: MeshSpec) -> Caches:
    """Empty caches, with the heads that a device of the mesh holds. dtype: of keys and values."""
    slot = lambda *shape: torch.zeros((limits.slots + 1, *shape), dtype=torch.int64, device=device)  # noqa: E731
    return Caches(
        groups=tuple(
            torch.zeros(
                (len(g.layers), pages * g.page + 1, 2, share(g.kv_heads, "kv_heads", mesh), g.head_dim),
                dtype=DTYPES[dtype],
                device=device,
            )
            for g, pages in zip(limits.groups, limits.pages, strict=True)
        ),
        length=slot(),
        last=slot(),
        tables=tuple(slot(width) for width in limits.max_row_pages),
        counts=torch.zeros((limits.slots if limits.max_history else 0, limits.vocab), dtype=torch.int32, device=device),
    )
