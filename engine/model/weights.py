"""Where weights come from. A backend asks for the slices it holds and gets just those."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError
from engine.mesh import MeshSpec, shard_shape, shard_slices
from engine.model.params import Param, params
from engine.model.spec import EIGHT, ModelSpec, eight

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
PERIOD = 1 << 20
STRIDE = 489_905
"""Between the windows of neighbouring rows, in numbers of the tape. Odd, so that the first PERIOD rows all differ."""


SCALES, INVERSES = "attention.scales", "attention.inverses"
"""What the names of a layer's scales of a cache, and of their inverses, end with."""
LEAST = 1e-30
"""Scales are above it, and below its inverse, so that both are float32 of full width."""
SCALE = 1 / 16
"""Of the cache of 8 bits of random weights, whose keys and values have a standard deviation near 1."""


class WeightSource(Protocol):
    """A checkpoint, random weights, or a trainer that pushes new ones."""

    def read(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
        """The slice `part` of parameter `name` (engine.model.params), in the source's dtype (ml_dtypes for bfloat16).
        Where the cache has 8 bits that may be the scales of a layer, whose inverses nobody is asked for; a source that
        knows none gives ones.

        May be a read-only view of a file; the caller copies or uploads it. Raises ModelError naming the tensor.
        """
        ...


def read_part(source: WeightSource, param: Param, mesh: MeshSpec, coordinate: Mapping[str, int]) -> NDArray[Any]:
    """What the device at `coordinate` (mesh axis -> index) holds of a parameter, padded with zeros to the size that all
    devices have. Raises ModelError naming the parameter where the source gives another shape."""
    part = shard_slices(param.shape, param.axes, mesh, coordinate)
    name = param.name.removesuffix(INVERSES) + SCALES if param.name.endswith(INVERSES) else param.name
    read, wanted = source.read(name, part), tuple(s.stop - s.start for s in part)
    if read.shape != wanted:
        raise ModelError(f"{param.name}: has shape {list(read.shape)}, not {list(wanted)}", field=param.name)
    if param.exact:
        read = check_scales(read, name)
        read = read if name == param.name else np.float32(1) / read
    local = shard_shape(param.shape, param.axes, mesh)
    return read if local == wanted else np.pad(read, [(0, n - m) for n, m in zip(local, wanted, strict=True)])


def check_scales(read: NDArray[Any], name: str) -> NDArray[np.float32]:
    """Scales of a cache as float32. Raises ModelError naming them where one is no number above 0."""
    value = np.asarray(read, np.float32)
    wrong = ~((value > LEAST) & (value < 1 / LEAST))
    if wrong.any():
        raise ModelError(f"{name}: a scale must be a number above 0, not {value[wrong][0]:g}", field=name)
    return value


class RandomWeights:
    """Gaussian weights at the speed of a copy, for benchmarks; in the spec's dtype, norms do nothing.

    The same for the same seed and name, however it is sliced. A row (the last dimension) is a window of one long random
    tape; where it starts follows from the row's index and the parameter's name.
    """

    def __init__(self, spec: ModelSpec, seed: int, std: float | None = None) -> None:
        """std: of every matrix and bias; None = fan_in ** -0.5, which keeps the size of activations."""
        self._params, self._std, self._seed = params(eight(spec, EIGHT[0])), std, seed
        self._dtype, self._offset = DTYPES[spec.dtype], spec.norm == "offset"
        width = max(p.shape[-1] for p in self._params.values())
        tape = np.random.default_rng(seed).standard_normal(PERIOD, np.float32)
        self._tape = np.concatenate([tape, np.resize(tape, width)])
        self._scaled: dict[float, NDArray[Any]] = {}

    def read(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
        """The slice `part` of a parameter; nothing larger is made. Raises ModelError for a name that isn't one."""
        param = self._params.get(name)
        if param is None:
            raise ModelError(f"no parameter is called {name!r}", field=name)
        bounds = [s.indices(n)[:2] for s, n in zip(part, param.shape, strict=True)]
        sizes = [stop - start for start, stop in bounds]
        if (value := self.constant(name)) is not None:
            return np.full(sizes, value, np.float32 if param.exact else self._dtype)
        row = np.zeros(1, np.int64)
        for (start, stop), size in zip(bounds[:-1], param.shape[:-1], strict=True):
            row = (row[:, None] * size + np.arange(start, stop)).ravel()
        begin = (row * STRIDE + self.start(name)) % PERIOD + bounds[-1][0]
        windows = np.lib.stride_tricks.sliding_window_view(self.tape(param), sizes[-1])
        return windows[begin].reshape(sizes)

    def constant(self, name: str) -> float | None:
        """What every entry of a norm, or of the scales of a cache, is; None for other parameters."""
        if name.endswith("norm"):
            return float(self.norm)
        if name.endswith(INVERSES):
            return 1 / SCALE
        return SCALE if name.endswith(SCALES) else None

    @property
    def norm(self) -> int:
        """What every entry of a norm is."""
        return 0 if self._offset else 1

    def start(self, name: str) -> int:
        """Where row 0 of a parameter starts on the tape, modulo PERIOD; row i starts i * STRIDE further."""
        return zlib.crc32(name.encode()) % PERIOD

    def tape(self, param: Param) -> NDArray[Any]:
        """The tape with the standard deviation of this parameter."""
        fan_in = math.prod(param.shape[1:]) if param.axes[0] == "hidden" else param.shape[-1]
        std = fan_in**-0.5 if self._std is None else self._std
        if std not in self._scaled:
            self._scaled[std] = (self._tape * np.float32(std)).astype(self._dtype)
        return self._scaled[std]
