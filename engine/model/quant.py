"""Quantised matrices: which they are, how numbers become fewer bits, and what they and their scales take."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError, ModelError
from engine.mesh import RULES, MeshSpec, parts, shard_shape, shard_slices
from engine.model.params import Param, params
from engine.model.spec import ModelSpec
from engine.model.weights import WeightSource

By: TypeAlias = Literal["row", "block"]
SIDE = 128
"""Rows and columns of a block."""
BY: dict[str, By] = {"int8": "row", "fp8": "block", "fp8-row": "row"}
"""What has a scale of its own: a row of the matrix, which makes one output, or each SIDE x SIDE of it."""
MOST = {"int8": 127.0, "fp8": 448.0, "fp8-row": 448.0}
"""The largest number, which the largest of a row or block becomes."""
DTYPES: dict[str, Any] = {
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8-row": np.dtype(ml_dtypes.float8_e4m3fn),
}
INNER = {"q": 1, "k": 1, "v": 1, "out": 2, "gate": 1, "up": 1, "down": 1}
"""Last part of the name of a matrix of a layer -> how many trailing dimensions a product sums over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a parameter stands as a quantised matrix [*lead, out, in]: lead is its experts, where it has them.

    lead, inner: how many of its dimensions are in front, and summed over.
    """

    param: Param
    kind: str
    lead: int
    inner: int

    def flat(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a matrix whose parameter, or part of it, has `shape`."""
        at = len(shape) - self.inner
        return (*shape[: self.lead], prod(shape[self.lead : at]), prod(shape[at:]))

    @property
    def axes(self) -> tuple[str, ...]:
        """One logical axis for each dimension of the matrix: that of the first of those that it joins."""
        axes = self.param.axes
        return (*axes[: self.lead], axes[self.lead], axes[len(axes) - self.inner])

    @property
    def head(self) -> int:
        """Dimensions of a head, where heads are outputs; 0 elsewhere."""
        at = len(self.param.axes) - self.inner
        return self.param.shape[at - 1] if self.param.axes[at - 1] == "head" else 0

    def body_shape(self, mesh: MeshSpec) -> tuple[int, ...]:
        """Of a device's part of the matrix."""
        return self.flat(shard_shape(self.param.shape, self.param.axes, mesh))

    def scale_shape(self, mesh: MeshSpec) -> tuple[int, ...]:
        """Of a device's scales: [*lead, 1, out], or [*lead, out / SIDE, in / SIDE] rounded up.

        Raises ConfigError where a mesh cuts blocks apart.
        """
        *lead, out, inner = self.body_shape(mesh)
        if BY[self.kind] == "row":
            return (*lead, 1, out)
        for size, axis in zip((out, inner), self.axes[-2:], strict=True):
            if size % SIDE and parts(axis, mesh) > 1:
                raise ConfigError(
                    f"model.quantise: {self.kind} has a scale for each {SIDE} x {SIDE}, and {mesh} would cut "
                    f"{self.param.name} into parts of {size}; use int8, or a smaller mesh",
                    field="model.quantise",
                )
        return (*lead, -(-out // SIDE), -(-inner // SIDE))

    def cut(self, body: NDArray[Any], scale: NDArray[Any], mesh: MeshSpec, at: dict[str, int]) -> tuple[Any, Any]:
        """The parts of a matrix and its scales, both whole, that the device at a coordinate (mesh axis -> index)
        holds."""
        part = shard_slices(self.param.shape, self.param.axes, mesh, at)
        inside = body.reshape(self.param.shape)[part].reshape(self.body_shape(mesh))
        end = len(self.param.shape) - self.inner
        rows = _span(self.param.shape[self.lead : end], part[self.lead : end])
        columns = _span(self.param.shape[end:], part[end:])
        if BY[self.kind] == "row":
            return inside, scale[..., rows]
        return inside, scale[..., _blocks(rows), _blocks(columns)]


def _span(shape: tuple[int, ...], part: tuple[slice, ...]) -> slice:
    """The slice of the joined dimension, where only the first is cut."""
    rest = prod(shape[1:])
    return slice(part[0].start * rest, part[0].stop * rest)


def _blocks(span: slice) -> slice:
    return slice(span.start // SIDE, -(-span.stop // SIDE))


def form(param: Param, kind: str) -> Form | None:
    """How a parameter is quantised; None where it is not: embeddings, head, routers, norms, biases."""
    inner = INNER.get(param.name.rpartition(".")[2])
    if kind == "none" or inner is None or not param.name.startswith("layers."):
        return None
    return Form(param=param, kind=kind, lead=int(param.axes[0] == "experts"), inner=inner)


def local_bytes(param: Param, kind: str, mesh: MeshSpec, itemsize: int) -> int:
    """Bytes of a parameter on one device, with its scales. itemsize: of one that is not quantised."""
    made = form(param, kind)
    if made is None:
        return prod(shard_shape(param.shape, param.axes, mesh)) * (4 if param.exact else itemsize)
    return prod(made.body_shape(mesh)) + 4 * prod(made.scale_shape(mesh))


def quantise(w: NDArray[Any], kind: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """w [*lead, out, in], finite, of any float -> the nearest numbers of `kind`, ties to even, and float32 scales: of
    each row, [*lead, 1, out], or each block, [*lead, out / SIDE, in / SIDE] rounded up.

    A scale is the largest magnitude of what it scales divided by MOST, in float32; 1 where all is 0.
    """
    if w.ndim > 2:
        made = [quantise(one, kind) for one in w]
        return np.stack([q for q, _ in made]), np.stack([s for _, s in made])
    wide = np.asarray(w, np.float32)
    if BY[kind] == "row":
        largest = np.abs(wide).max(axis=1)[None]
    else:
        rows = np.maximum.reduceat(np.abs(wide), np.arange(0, wide.shape[0], SIDE), axis=0)
        largest = np.maximum.reduceat(rows, np.arange(0, wide.shape[1], SIDE), axis=1)
    scale = np.where(largest == 0, np.float32(1), largest / np.float32(MOST[kind]))
    scale = np.maximum(scale, np.finfo(np.float32).tiny)  # a smaller one would lose bits of its own
    ratio = np.clip(wide / _each(scale, wide.shape, kind), -MOST[kind], MOST[kind])
    return (np.rint(ratio) if kind == "int8" else ratio).astype(DTYPES[kind]), scale


def dequantise(q: NDArray[Any], scale: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """The numbers that `quantise` made, float32[*lead, out, in]."""
    return q.astype(np.float32) * _each(scale, q.shape, kind)


def _each(scale: NDArray[np.float32], shape: tuple[int, ...], kind: str) -> NDArray[np.float32]:
    """The scales as they stand against a matrix of `shape`."""
    if BY[kind] == "row":
        return scale.swapaxes(-1, -2)
    return scale.repeat(SIDE, -2)[..., : shape[-2], :].repeat(SIDE, -1)[..., : shape[-1]]


@runtime_checkable
class Narrow(Protocol):
    """A source that may have matrices quantised as they are wanted."""

    def has(self, name: str, kind: str) -> bool:
        """Whether it has parameter `name` as `kind`."""
        ...

    def quantised(self, name: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """One that it has: [*lead, out, in] and its scales, as `quantise` gives them."""
        ...


def has(source: WeightSource, made: Form) -> bool:
    """Whether a source has a matrix quantised as it is wanted, so that nothing is left to do."""
    return isinstance(source, Narrow) and source.has(made.param.name, made.kind)


def read_whole(source: WeightSource, p: Param) -> NDArray[Any]:
    """A whole parameter, as the source has it. Raises ModelError naming one of another shape."""
    read = source.read(p.name, tuple(slice(0, n) for n in p.shape))
    if read.shape != p.shape:
        raise ModelError(f"{p.name}: has shape {list(read.shape)}, not {list(p.shape)}", field=p.name)
    return read


def not_finite(made: Form) -> ModelError:
    """A parameter that can't be quantised."""
    name = made.param.name
    return ModelError(f"{name}: has numbers that are not finite, which {made.kind} can't hold", field=name)


def read_quantised(source: WeightSource, made: Form) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """A whole parameter, quantised: [*lead, out, in] and its scales. The whole, whatever a device holds of it, so that
    a mesh changes no number. Raises ModelError naming a parameter that is not finite."""
    p = made.param
    if isinstance(source, Narrow) and source.has(p.name, made.kind):
        body, scale = source.quantised(p.name)
    else:
        read = read_whole(source, p)
        if not np.isfinite(read).all():
            raise not_finite(made)
        return quantise(np.asarray(read).reshape(made.flat(p.shape)), made.kind)
    if not np.isfinite(scale).all() or np.isnan(body.astype(np.float32)).any():
        raise not_finite(made)
    return body, scale


class Dequantised:
    """A source whose quantised matrices are read as the float32 numbers that they stand for: what the reference
    computes with, and what another engine must be given to agree with a quantised one."""

    def __init__(self, source: WeightSource, spec: ModelSpec, kind: str) -> None:
        self._source, self._kind, self._params = source, kind, params(spec)

    def read(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
        """The slice `part` of a parameter. Raises ModelError naming it."""
        param = self._params.get(name)
        made = form(param, self._kind) if param else None
        if made is None:
            return self._source.read(name, part)
        q, scale = read_quantised(self._source, made)
        return dequantise(q, scale, self._kind).reshape(made.param.shape)[part]


def split_by(made: Form) -> tuple[str | None, ...]:
    """The mesh axis that splits each dimension of the matrix."""
    return tuple(RULES[axis] for axis in made.axes)
