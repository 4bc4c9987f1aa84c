"""Rows that read the same pages, as kernels_cuda.cascade wants them, in the order that rows have on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from backends.api.step import ScheduleStep
from backends.torch.caches import DTYPES as HELD
from backends.torch.params import DTYPES
from engine.config import Resolved
from engine.mesh import share
from engine.model.spec import ModelSpec
from kernels_cuda import cascade
from kernels_cuda.attention import FEW, splits

FEWEST = 16
"""Padded steps of fewer rows are captured without tiles."""
TILES, SLOTS = 64, 8
"""Room for tiles in captured steps, at least, and along one row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How groups are cut into tiles. group: query heads of a kv head; heads: of a tile's product; sms: of the device.
    least: positions that a step must save to be worth it."""

    group: int
    kv_heads: int
    heads: int
    sms: int
    least: int

    def bound(self, rows: int, reach: int) -> cascade.Shape:
        """The numbers of every step that is padded to so many rows, of up to `reach` positions."""
        parts = splits(rows * self.kv_heads, reach, self.sms)
        wide = max(self.heads // self.group, 1)
        return cascade.Shape(tiles=max(TILES, rows), rows=rows, wide=wide, slots=SLOTS, parts=parts)


class Branches(NamedTuple):
    """Tiles on the device, and their numbers. They belong to the first shape.rows rows."""

    tiles: cascade.Tiles
    shape: cascade.Shape


def layout(spec: ModelSpec, config: Resolved, sms: int, kernel: bool) -> Layout | None:
    """How a model's groups are cut; None where each row is attended by itself. kernel: whether there is one for it."""
    if config.cascade == "off" or (config.cascade == "auto" and not kernel):
        return None
    mixer = next(layer.mixer for layer in spec.layers if layer.mixer.window is None)
    kv_heads, dtype = share(mixer.kv_heads, "kv_heads", config.mesh), DTYPES[config.dtype]
    group = mixer.q_heads // mixer.kv_heads
    entry = 2 * kv_heads * mixer.head_dim * HELD[config.cache_dtype].itemsize
    heads = cascade.tuning(group, mixer.head_dim, dtype.itemsize, torch.version.hip is not None).heads
    least = 0 if config.cascade == "on" else cascade.LEAST_BYTES // entry
    return Layout(group=group, kv_heads=kv_heads, heads=heads, sms=sms, least=least)


def pays(layout: Layout | None, step: ScheduleStep) -> bool:
    """Whether a step's rows share so much. Rows of a few tokens, which kernels join to those of one, rule it out."""
    if layout is None or not len(step.shared) or cascade.saved(step.shared) < max(layout.least, 1):
        return False
    return not np.count_nonzero((step.lens > 1) & (step.lens <= FEW))


def tell(step: ScheduleStep, layout: Layout, rows: NDArray[np.int64], bound: cascade.Shape | None) -> cascade.Cut:
    """A step's groups, cut. rows: place on the device -> row of the step, those of one token first. bound: what a
    padded step has room for."""
    ones = int(np.count_nonzero(step.lens == 1))
    place = np.empty(len(rows), np.int64)
    place[rows] = np.arange(len(rows))
    first, last, begin, end = step.shared.T
    whole = (place[last] - place[first] == last - first) & (place[last] < ones)  # the others stay as they were sent
    groups = np.stack([place[first], place[last], begin, end], 1)[whole]
    tiles, slots = (1 << 20, cascade.SLOTS) if bound is None else (bound.tiles, bound.slots)
    return _cut(groups.tobytes(), ones, layout, tiles, slots)


@lru_cache(maxsize=8)
def _cut(groups: bytes, rows: int, layout: Layout, tiles: int, slots: int) -> cascade.Cut:
    """The groups of a step are mostly those of the step before."""
    return cascade.cut(
        np.frombuffer(groups, np.int64).reshape(-1, 4).tolist(),
        rows,
        group=layout.group,
        kv_heads=layout.kv_heads,
        heads=layout.heads,
        sms=layout.sms,
        tiles=tiles,
        slots=slots,
    )


def send(step: ScheduleStep, layout: Layout, rows: NDArray[np.int64], device: torch.device) -> Branches | None:
    """Bring the groups of a step that is not padded to the device; None where none are left."""
    made = tell(step, layout, rows, None)
    if not len(made.tiles):
        return None
    own = int((step.upper[rows[: len(made.used)]] - made.covered).max())
    shape = cascade.fit(made, own, kv_heads=layout.kv_heads, sms=layout.sms)
    parts = [torch.from_numpy(x) for x in cascade.pad(made, shape)]
    if device.type == "cuda":
        parts = [x.pin_memory().to(device, non_blocking=True) for x in parts]
    return Branches(cascade.Tiles(*parts), shape)
