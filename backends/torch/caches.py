"""What the device keeps between steps: the caches of keys and values, and what it knows of each slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from backends.api.limits import Limits
from backends.api.step import I32
from backends.torch.params import DTYPES
from engine.mesh import MeshSpec, share


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
