"""Free pages of one cache group."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Pages: TypeAlias = "array[int]"
"""Page ids as int32: sliced and joined at memory speed, and as `ids` sees them without a copy."""

FEW = 24
"""Up to so many pages a loop is faster than numpy."""


def ids(pages: Pages) -> npt.NDArray[np.int32]:
    """A view of page ids for numpy. `pages` can't grow or shrink while it lives."""
    return np.frombuffer(pages, np.int32)


class PagePool:
    """A free list of page ids 0..total-1. Taking too many and giving back twice are faults, and raise."""

    __slots__ = ("_free", "_out", "_outs", "total")

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = array("i", range(total - 1, -1, -1))
        self._out = bytearray(total)
        self._outs: npt.NDArray[np.bool_] = np.frombuffer(self._out, np.bool_)  # the same bytes

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return len(self._free)

    def take(self, count: int) -> Pages:
        """Take `count` pages. Raises IndexError when there are fewer."""
        left = len(self._free) - count
        if left < 0:
            raise IndexError(f"{count} pages asked, {len(self._free)} free")
        pages = self._free[left:]
        del self._free[left:]
        if count <= FEW:
            for page in pages:
                self._out[page] = True
        else:
            pages.reverse()
            self._outs[ids(pages)] = True
        return pages

    def give(self, pages: Iterable[int]) -> None:
        """Give pages back. Raises ValueError for a page that is free already; then none of them was given."""
        pages = pages if isinstance(pages, array) else array("i", pages)
        if len(pages) <= FEW:
            for i, page in enumerate(pages):
                if page < 0 or not self._out[page]:
                    for given in pages[:i]:
                        self._out[given] = True
                    raise ValueError(f"page {page} was given back twice")
                self._out[page] = False
        else:
            self._give_many(ids(pages))
        self._free.extend(pages)

    def _give_many(self, pages: npt.NDArray[np.int32]) -> None:
        rising = np.sort(pages)
        twice = rising[1:][rising[1:] == rising[:-1]]
        bad = twice if len(twice) else rising[(rising < 0) | ~self._outs[rising]]
        if len(bad):
            raise ValueError(f"page {bad[0]} was given back twice")
        self._outs[pages] = False

    def listed(self) -> npt.NDArray[np.int64]:
        """A copy of the free list, for `engine.cache.check`."""
        return np.array(self._free, np.int64)

    def marked(self) -> npt.NDArray[np.bool_]:
        """[total]: whether a page counts as taken; a copy."""
        return self._outs.copy()

    def reset(self, out: npt.NDArray[Any]) -> None:
        """Begin anew with the pages taken where `out` [total] says so, and all others free."""
        self._outs[:] = out
        self._free = array("i", np.flatnonzero(~self._outs)[::-1].astype(np.int32).tobytes())
