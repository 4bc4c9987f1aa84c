"""Free pages of one cache group."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """A free list of page ids 0..total-1. Taking too many and giving back twice are faults, and raise."""

    __slots__ = ("_free", "_out", "total")

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._out = bytearray(total)

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take `count` pages. Raises IndexError when there are fewer."""
        if count > len(self._free):
            raise IndexError(f"{count} pages asked, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._out[page] = 1
        return pages

    def give(self, pages: Iterable[int]) -> None:
        """Give pages back. Raises ValueError for a page that is free already."""
        for page in pages:
            if not self._out[page]:
                raise ValueError(f"page {page} was given back twice")
            self._out[page] = 0
            self._free.append(page)
