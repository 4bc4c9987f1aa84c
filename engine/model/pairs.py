"""The tensors of a checkpoint that holds matrices in float8_e4m3fn: each and its scales are one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError
from engine.model.lazy import Box, Fetch
from engine.model.orbax import Stored
from engine.model.quant import SIDE
from engine.model.shards import FLOAT8, Tensor
from engine.model.spec import Narrow

INPUT = ".input_scale"
SCALES = ("F32", "BF16", "F16")


class Pairs:
    """The tensors of a checkpoint, where a matrix and its scales are one: read, it is float32 numbers."""

    def __init__(self, found: Mapping[str, Tensor], how: Narrow, files: Mapping[Any, NDArray[np.uint8]]) -> None:
        """Raises ModelError naming a scale that is missing, belongs to no matrix, or has another shape."""
        self._how, self._files = how, files
        self.tensors: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._bodies = {name: t for name, t in found.items() if t.dtype == FLOAT8}
        beside: dict[str, str] = {}
        for name in self._bodies:
            base = name.removesuffix(".weight")
            beside[base + how.suffix] = name
            if how.inputs:
                beside[base + INPUT] = name
        for name, tensor in found.items():
            if name in self._bodies:
                self.tensors[name] = self._joined(name, found)
            elif name not in beside:
                self.tensors[name] = tensor  # a scale without its matrix is a tensor of no parameter

    def body(self, name: str) -> NDArray[Any]:
        """The matrix as it is stored, float8_e4m3fn [out, in]."""
        tensor = self._bodies[name]
        return np.asarray(tensor.view(self._files[tensor.file]))

    def scale(self, name: str) -> NDArray[np.float32]:
        """Its scales: float32 [out, 1], or [out / SIDE, in / SIDE] rounded up."""
        tensor, (rows, columns) = self._scales[name], self._bodies[name].shape
        read = np.asarray(tensor.view(self._files[tensor.file])).astype(np.float32)
        if self._how.by == "block":
            return read.reshape(-(-rows // SIDE), -(-columns // SIDE))
        return np.broadcast_to(read.reshape(-1, 1), (rows, 1))

    def __contains__(self, name: str) -> bool:
        """Whether a tensor is such a matrix."""
        return name in self._bodies

    def _joined(self, name: str, found: Mapping[str, Tensor]) -> Stored:
        body, of = self._bodies[name], name.removesuffix(".weight") + self._how.suffix
        if len(body.shape) != 2 or not name.endswith(".weight"):
            raise ModelError(f"{body.file}: tensor {name!r} has dtype {FLOAT8} and is no matrix", field=name)
        if of not in found:
            raise ModelError(f"{body.file}: tensor {of!r} is missing, the scale of {name!r}", field=of)
        scale = self._scales[name] = found[of]
        rows, columns = body.shape
        shapes: dict[str, list[tuple[int, ...]]] = {
            "tensor": [(), (1,), (1, 1)],
            "row": [(rows, 1), (rows,)],
            "block": [(-(-rows // SIDE), -(-columns // SIDE))],
        }
        allowed = shapes[self._how.by]
        if scale.shape not in allowed or scale.dtype not in SCALES:
            what = f"is {scale.dtype} {list(scale.shape)}, for a {self._how.by} of {list(body.shape)} it must be"
            raise ModelError(f"{scale.file}: tensor {of!r} {what} {' or '.join(SCALES)}, {list(allowed[0])}", field=of)
        return Stored(
            name=name,
            file=body.file,
            dtype="F32",
            shape=body.shape,
            start=body.start,
            stop=body.stop,
            fetch=self._fetch(name),
            chunk=body.shape,
        )

    def _fetch(self, name: str) -> Fetch:
        def fetch(box: Box) -> NDArray[Any]:
            body, scale = self.body(name)[box].astype(np.float32), self.scale(name)
            if self._how.by != "block":
                return body * scale[box[0]]
            r, c = (np.arange(s.start, s.stop) // SIDE for s in box)
            out: NDArray[Any] = body * scale[r[:, None], c[None, :]]
            return out

        return fetch
