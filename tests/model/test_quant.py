"""Numbers in fewer bits, against a plain loop over every number that there is."""

from __future__ import annotations

from math import prod

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.errors import ConfigError, ModelError
from engine.mesh import MeshSpec, shard_shape, shard_slices
from engine.model.params import Param, params
from engine.model.quant import DTYPES, Dequantised, dequantise, form, local_bytes, quantise, read_quantised
from engine.model.weights import RandomWeights
from tests.test_config import model

ONE = MeshSpec()
FINITE = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
"""Every fp8 number from 0 to 448, in order; the index of each is its bits."""


def nearest(value: float, kind: str) -> float:
    """The nearest number of a kind; of two, the one whose last bit is 0."""
    numbers = np.arange(128, dtype=np.float64) if kind == "int8" else FINITE
    gap = np.abs(numbers - abs(value))
    best = np.flatnonzero(gap == gap.min())
    return float(np.copysign(numbers[best[best % 2 == 0][0] if len(best) > 1 else best[0]], value))


@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8-row"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_each_number_is_the_nearest(kind: str, dtype: type) -> None:
    draw = np.random.default_rng(3)
    w = (draw.standard_normal((140, 150)) * 10.0 ** draw.integers(-4, 3, (140, 1))).astype(dtype)
    w[7] = 0
    q, scale = quantise(w, kind)
    assert q.dtype == DTYPES[kind]
    assert scale.shape == ((2, 2) if kind == "fp8" else (1, 140))
    wide, most = w.astype(np.float32), np.float32(127 if kind == "int8" else 448)
    for r, c in zip(draw.integers(0, 140, 400), draw.integers(0, 150, 400), strict=True):
        i, j = r // 128 * 128, c // 128 * 128
        largest = np.abs(wide[r] if kind != "fp8" else wide[i : i + 128, j : j + 128]).max()
        step = largest / most if largest else np.float32(1)
        assert step == (scale[0, r] if kind != "fp8" else scale[r // 128, c // 128])
        assert float(q[r, c]) == nearest(float(wide[r, c] / step), kind)
    again = dequantise(q, scale, kind)
    assert np.abs(again - wide).max() <= np.abs(wide).max() * (1 / 254 if kind == "int8" else 2**-4) * 1.001


def test_fp8_rounds_as_ml_dtypes_does_ties_and_all() -> None:
    """Halfway points between neighbours, and what is a little beside them."""
    middle = (FINITE[1:] + FINITE[:-1]) / 2
    values = np.concatenate([FINITE, middle, np.nextafter(middle, 0), np.nextafter(middle, 1e3)]).astype(np.float32)
    values[0] = 448  # so that the scale is 1
    w = np.zeros((128, 128), np.float32)
    w.flat[: len(values)] = values
    q, scale = quantise(w, "fp8")
    assert scale[0, 0] == 1
    np.testing.assert_array_equal(q.view(np.uint8), w.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def test_what_is_quantised() -> None:
    spec = model()
    found = {name.rpartition(".")[2] for name, p in params(spec).items() if form(p, "int8")}
    assert found == {"q", "k", "v", "out", "gate", "up", "down"}
    router = Param(name="layers.0.moe.router", shape=(4, 8), axes=("experts", "hidden"))
    assert form(router, "int8") is None
    assert form(params(spec)["embed"], "fp8") is None
    assert all(form(p, "none") is None for p in params(spec).values())
    q = params(spec)["layers.0.attention.q"]  # 4 heads of 64, hidden 256
    assert local_bytes(q, "int8", ONE, 4) == 256 * 256 + 4 * 256
    assert local_bytes(q, "fp8", ONE, 4) == 256 * 256 + 4 * 4
    assert local_bytes(q, "none", ONE, 4) == 256 * 256 * 4


def whole(source: Dequantised, p: Param) -> NDArray[np.float32]:
    return source.read(p.name, tuple(slice(0, n) for n in p.shape))


@pytest.mark.parametrize(("kind", "tp"), [("int8", 2), ("int8", 4), ("fp8", 2)])
def test_parts_on_a_mesh_are_parts_of_the_whole(kind: str, tp: int) -> None:
    """No number depends on the mesh: what a device holds stands for its part of the whole, repeated heads too."""
    spec, mesh = model(), MeshSpec(tp=tp)
    source = RandomWeights(spec, 1)
    right = Dequantised(source, spec, kind)
    for p in params(spec).values():
        made = form(p, kind)
        if made is None or not p.name.startswith("layers.0"):
            continue
        if kind == "fp8" and p.axes[0] == "kv_heads":
            with pytest.raises(ConfigError, match=r"would cut layers\.0.attention\.. into parts of 64"):
                made.scale_shape(mesh)
            continue
        body, scale = read_quantised(source, made)
        for rank in range(tp):
            inside, scales = made.cut(body, scale, mesh, {"tp": rank})
            assert (inside.shape, scales.shape) == (made.body_shape(mesh), made.scale_shape(mesh))
            part = whole(right, p)[shard_slices(p.shape, p.axes, mesh, {"tp": rank})]
            np.testing.assert_array_equal(dequantise(inside, scales, kind), part.reshape(inside.shape))
        assert prod(shard_shape(p.shape, p.axes, mesh)) == prod(made.body_shape(mesh))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_by_name(bad: float) -> None:
    class Broken(RandomWeights):
        def read(self, name: str, part: tuple[slice, ...]) -> NDArray[np.float32]:
            out = np.array(super().read(name, part))
            out[..., -1] = bad
            return out

    with pytest.raises(ModelError, match=r"layers\.0\.attention\.q: has numbers that are not finite"):
        whole(Dequantised(Broken(model(), 0), model(), "int8"), params(model())["layers.0.attention.q"])
