"""An array that is read when it is looked at: slicing, splitting and transposing it only says which bytes will be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Box: TypeAlias = tuple[slice, ...]
Fetch: TypeAlias = Callable[[Box], NDArray[Any]]
"""(start and stop of each stored axis) -> that part, read-only or a copy."""


class Dim(NamedTuple):
    """One dimension of a view: entry i lies `step * i` further on the stored axis."""

    axis: int
    step: int
    size: int


class Lazy:
    """A view of a stored array [shape]. Whatever it can't express as a view (any other key, shape or function of numpy)
    reads what it has and goes on with a real array."""

    def __init__(
        self,
        fetch: Fetch,
        dtype: np.dtype[Any],
        shape: Sequence[int],
        dims: Sequence[Dim] | None = None,
        start: Sequence[int] | None = None,
    ) -> None:
        """shape: as stored. dims, start: of a view: its dimensions, and where it begins on each stored axis."""
        self._fetch, self.dtype, self._stored = fetch, dtype, tuple(shape)
        self._dims = tuple(Dim(i, 1, n) for i, n in enumerate(shape)) if dims is None else tuple(dims)
        self._start = (0,) * len(self._stored) if start is None else tuple(start)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the view."""
        return tuple(d.size for d in self._dims)

    @property
    def ndim(self) -> int:
        """Dimensions of the view."""
        return len(self._dims)

    def __len__(self) -> int:
        return self.shape[0]

    def _view(self, dims: Sequence[Dim], start: Sequence[int] | None = None) -> Lazy:
        return Lazy(self._fetch, self.dtype, self._stored, dims, self._start if start is None else start)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Read the smallest box that holds the view; nothing where it is empty."""
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, dtype or self.dtype)
        last = list(self._start)
        for d in self._dims:
            last[d.axis] += d.step * (d.size - 1)
        block = self._fetch(tuple(slice(a, b + 1) for a, b in zip(self._start, last, strict=True)))
        strides = [d.step * block.strides[d.axis] for d in self._dims]
        out = np.lib.stride_tricks.as_strided(block, self.shape, strides, writeable=False)
        return np.array(out, dtype) if copy or dtype not in (None, self.dtype) else out

    def __getitem__(self, key: Any) -> Any:
        """A view, for whole numbers and slices that go forward."""
        parts = key if isinstance(key, tuple) else (key,)
        if Ellipsis in parts and parts.count(Ellipsis) == 1:
            at, rest = parts.index(Ellipsis), len(parts) - 1
            parts = (*parts[:at], *[slice(None)] * (self.ndim - rest), *parts[at + 1 :])
        plain = all((isinstance(p, slice) and (p.step or 1) > 0) or type(p) is int for p in parts)
        if not plain or len(parts) > self.ndim:
            return np.asarray(self)[key]
        dims, start = [], list(self._start)
        for d, part in zip(self._dims, (*parts, *[slice(None)] * (self.ndim - len(parts))), strict=True):
            if isinstance(part, slice):
                low, high, step = part.indices(d.size)
                dims.append(Dim(d.axis, d.step * step, len(range(low, high, step))))
            else:
                low = range(d.size)[part]  # IndexError as numpy raises it
            start[d.axis] += low * d.step
        return self._view(dims, start)

    def reshape(self, *shape: Any) -> Any:
        """A view where each dimension is kept or split; as numpy does otherwise."""
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        dims = self._split(tuple(sizes))
        return np.asarray(self).reshape(sizes) if dims is None else self._view(dims)

    def _split(self, sizes: tuple[int, ...]) -> list[Dim] | None:
        """The dimensions of a reshape that only splits; None for any other."""
        if math.prod(sizes) != math.prod(self.shape) or min(sizes, default=1) < 1:
            return None
        dims, left = [], list(sizes)
        for d in self._dims:
            size = d.size
            while size > 1 or (left and left[0] == 1):
                if not left or size % left[0]:
                    return None
                size //= left[0]
                dims.append(Dim(d.axis, d.step * size, left.pop(0)))
        return None if left else dims

    def transpose(self, *axes: Any) -> Lazy:
        """Dimensions in another order; reversed without arguments."""
        order = axes[0] if len(axes) == 1 and isinstance(axes[0], tuple | list) else axes
        order = order or tuple(reversed(range(self.ndim)))
        return self._view([self._dims[i] for i in order])

    @property
    def T(self) -> Lazy:
        """Dimensions reversed."""
        return self.transpose()

    def swapaxes(self, a: int, b: int) -> Lazy:
        """Two dimensions in each other's place."""
        order = list(range(self.ndim))
        order[a], order[b] = order[b], order[a]
        return self.transpose(order)
