"""Weights on their way to a torch device, seen on a CPU: quantised there, drawn there, in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backends.torch.quantising import draw, quantise
from backends.torch.staging import Staging, as_tensor, pieces
from engine.model import quant
from engine.model.params import params
from engine.model.weights import RandomWeights
from models_torch import quantised
from models_torch.quantised import Quantised
from tests.test_config import model


def same(a: torch.Tensor, b: NDArray[Any]) -> None:
    """The same bits."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[b.itemsize]
    assert tuple(a.shape) == b.shape
    assert torch.equal(a.contiguous().view(width), as_tensor(b).view(width))


@pytest.mark.parametrize("kind", quant.BY)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_quantises_as_numpy_does(kind: str, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: several pieces, rows and blocks that are not full, zeros, the smallest numbers, experts."""
    monkeypatch.setattr("backends.torch.quantising.ROOM", 1)
    r = np.random.default_rng(5)
    w = (r.standard_normal((2, 300, 200)) * 10.0 ** r.integers(-6, 3, (2, 300, 1))).astype(dtype)
    w[0, 7] = 0
    w[0, 128:256, :128] = 0
    w[1, 9] = np.finfo(np.float32).smallest_subnormal
    body, scale = quantise(as_tensor(w), kind)
    right, scales = quant.quantise(w, kind)
    same(body, right)
    same(scale, scales)


def test_a_number_that_is_none_shows_in_the_scales() -> None:
    for kind in quant.BY:
        for bad in (float("nan"), float("inf")):
            w = torch.ones(130, 130)
            w[129, 3] = bad
            assert not quantise(w, kind)[1].isfinite().all(), (kind, bad)


@pytest.mark.parametrize("std", [None, 0.02])
def test_draws_as_the_source_does(std: float | None) -> None:
    spec = model()
    source = RandomWeights(spec, 3, std)
    for p in params(spec).values():
        right = source.read(p.name, tuple(slice(0, n) for n in p.shape))
        same(draw(source, p, as_tensor(source.tape(p))), np.ascontiguousarray(right))


@pytest.mark.parametrize("shape", [(7, 5), (3, 1000), (2, 3, 64), (1,), (4096,)])
def test_pieces_make_the_whole(shape: tuple[int, ...]) -> None:
    """Whatever a buffer holds: many rows, one, or a part of one."""
    read = np.random.default_rng(0).integers(0, 1 << 16, shape).astype(np.uint16)
    sent: list[int] = []
    for view in (read, read[::-1], read.T):
        out = torch.zeros(view.shape, dtype=torch.uint16)
        for to, part in pieces(out, view, 256):
            assert part.nbytes <= 256
            sent.append(part.nbytes)
            to.copy_(torch.from_numpy(part.copy()))
        assert torch.equal(out, torch.from_numpy(view.copy()))
    assert sent


def test_a_fault_comes_through_and_ends_it(tmp_path: Path) -> None:
    def make(i: int) -> int:
        if i == 3:
            raise ValueError("three")
        return i

    with pytest.raises(ValueError, match="three"):
        Staging(torch.device("cpu")).each(make, range(8))
    assert Staging(torch.device("cpu")).each(make, range(3)) == [0, 1, 2]


@pytest.mark.parametrize(("kind", "joins"), [("int8", True), ("fp8", True), ("fp8-row", True), ("fp8", False)])
def test_joined_matrices_are_one_product(kind: str, joins: bool) -> None:
    """Of 256, 128 and 70 rows the last may leave a block open; of 70, 256 and 128 the first may not."""
    r = np.random.default_rng(2)
    rows = (256, 128, 70) if joins else (70, 256, 128)
    made = []
    for size in rows:
        body, scale = quant.quantise(r.standard_normal((size, 200), np.float32), kind)
        made.append(Quantised(shape=(size, 200), body=as_tensor(body), scale=as_tensor(scale), by=quant.BY[kind]))
    together, x = quantised.join(made), torch.randn(3, 200)
    if not joins:
        assert together is None
        return
    assert together is not None
    right = torch.cat([one.multiply(x) for one in made], 1)
    torch.testing.assert_close(together.multiply(x), right)
    other = quantised.join([*made[:2], made[2]])
    assert other is not None
    other.body.zero_()
    other.copy_(together)
    assert torch.equal(other.multiply(x), together.multiply(x))
    wide = Quantised(shape=(9, 200), body=made[0].body[:9], scale=made[0].scale, by=made[0].by, how="bits")
    assert quantised.join([made[0], wide]) is None
