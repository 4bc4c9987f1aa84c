"""Views that read late, against numpy: random chains of slices, splits and transpositions."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.model.lazy import Box, Lazy

WHOLE = np.arange(24 * 10 * 6, dtype=np.float32).reshape(24, 10, 6)


class Store:
    """What was read: numbers, and numbers at a time."""

    def __init__(self) -> None:
        self.boxes: list[Box] = []

    def __call__(self, box: Box) -> NDArray[Any]:
        self.boxes.append(box)
        return WHOLE[box].copy()

    @property
    def read(self) -> int:
        return sum(int(np.prod([s.stop - s.start for s in box])) for box in self.boxes)


def step(rng: random.Random, shape: tuple[int, ...]) -> tuple[str, Any]:
    """One thing that may be done to an array of this shape."""
    kind = rng.choice(["slice", "slice", "split", "transpose", "index", "add", "step", "merge"])
    if kind == "split":
        at = rng.randrange(len(shape))
        parts = [d for d in range(1, shape[at] + 1) if shape[at] % d == 0]
        first = rng.choice(parts)
        return "reshape", (*shape[:at], first, shape[at] // first, *shape[at + 1 :])
    if kind == "merge" and len(shape) > 1:
        return "reshape", (shape[0] * shape[1], *shape[2:])
    if kind == "add":
        return "reshape", (*shape, 1)
    if kind == "transpose":
        return "transpose", rng.sample(range(len(shape)), len(shape))
    if kind == "index" and len(shape) > 1:
        return "getitem", rng.randrange(-shape[0], shape[0])
    if kind == "step":
        forward = slice(int(shape[0] > 1), None, rng.choice([2, 3]))
        return "getitem", (rng.choice([forward, forward, slice(None, None, -1)]), ...)
    cut = [sorted(rng.choices(range(n + 1), k=2)) for n in shape]
    parts = [slice(a, b) if b > a else slice(None) for a, b in cut][: rng.randint(1, len(shape))]
    return "getitem", rng.choice([tuple(parts), (..., parts[0]) if len(parts) == len(shape) == 1 else tuple(parts)])


def do(x: Any, what: str, how: Any) -> Any:
    if what == "getitem":
        return x[how]
    return x.reshape(how) if what == "reshape" else x.transpose(how)


def test_views_are_numpys() -> None:
    rng, lazy = random.Random(0), 0
    for _ in range(400):
        expected: Any = WHOLE
        found: Any = Lazy(Store(), WHOLE.dtype, WHOLE.shape)
        for _ in range(rng.randint(1, 5)):
            what, how = step(rng, expected.shape)
            expected, found = do(expected, what, how), do(found, what, how)
            assert found.shape == expected.shape, (what, how)
            lazy += isinstance(found, Lazy)
        np.testing.assert_array_equal(np.asarray(found), expected)
    assert lazy > 400  # most of them read nothing until they were looked at


def test_a_shard_reads_no_more_than_itself() -> None:
    store = Store()
    heads = Lazy(store, WHOLE.dtype, WHOLE.shape).reshape(6, 4, 10, 6)[2:4, :, 5:]
    assert not store.boxes
    assert isinstance(heads, Lazy)
    np.testing.assert_array_equal(np.require(heads, requirements="A"), WHOLE.reshape(6, 4, 10, 6)[2:4, :, 5:])
    assert store.read == heads.shape[0] * 4 * 5 * 6


def test_what_numpy_takes() -> None:
    lazy = Lazy(Store(), WHOLE.dtype, WHOLE.shape)
    np.testing.assert_array_equal(np.stack([lazy, lazy]), np.stack([WHOLE, WHOLE]))
    np.testing.assert_array_equal(lazy.T, WHOLE.T)
    np.testing.assert_array_equal(lazy.swapaxes(0, 2), WHOLE.swapaxes(0, 2))
    np.testing.assert_array_equal(lazy[[1, 5]], WHOLE[[1, 5]])
    np.testing.assert_array_equal(lazy.reshape(-1), WHOLE.reshape(-1))
    assert np.asarray(lazy, np.float64).dtype == np.float64
    assert lazy[3:3].shape == np.asarray(lazy[3:3]).shape == (0, 10, 6)
    with pytest.raises(IndexError):
        lazy[24]
