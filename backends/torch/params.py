"""Weights from a source to the device: one tensor a parameter, in the tree that the model code reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.mesh import MeshSpec
from engine.model.params import params
from engine.model.spec import ModelSpec
from engine.model.weights import WeightSource, read_part
from models_torch.packed import pack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INNER = {"q": 1, "k": 1, "v": 1, "out": 2, "gate": 1, "up": 1, "down": 1, "head": 1}
"""Last part of a matrix's name -> how many trailing dimensions a product sums over."""


def upload(
    spec: ModelSpec, source: WeightSource, dtype: torch.dtype, device: torch.device, mesh: MeshSpec, rank: int = 0
) -> dict[str, Any]:
    """Read this rank's part of every parameter: {"embed": ..., "layers": [{"attention": {"q": ...}}], ...}, in `dtype`
    on `device`.

    On a CPU the matrices of a 16-bit checkpoint are packed where that is possible (models_torch.packed).
    Raises ModelError naming the tensor.
    """
    tree: dict[str, Any] = {"layers": [{} for _ in spec.layers]}
    for name, p in params(spec).items():
        value = as_tensor(read_part(source, p, mesh, {"tp": rank}))
        *path, leaf = name.split(".")
        inner = 1 if name == "embed" and spec.tied else INNER.get(leaf)
        at: Any = tree
        for part in path:
            at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
        if p.exact:
            at[leaf] = _placed(value, None, torch.float32, device)
        elif p.axes[0] == "experts" and inner and device.type == "cpu":
            at[leaf] = [_placed(one, inner, dtype, device) for one in value]
        else:
            at[leaf] = _placed(value, inner, dtype, device, name == "embed")
    return tree


def _placed(
    value: torch.Tensor, inner: int | None, dtype: torch.dtype, device: torch.device, embed: bool = False
) -> Any:
    """A parameter on its device, packed where that is possible. inner: as INNER has it, None for no matrix."""
    packed = pack(value, inner, dtype, embed) if device.type == "cpu" and inner else None
    return value.to(device=device, dtype=dtype) if packed is None else packed


def as_tensor(read: NDArray[Any]) -> torch.Tensor:
    """A copy of an array on the CPU. torch doesn't know the bfloat16 of ml_dtypes: it takes the bits."""
    if read.dtype.name == "bfloat16":
        return torch.from_numpy(read.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(read.copy())


def held(tree: Any) -> int:
    """Bytes of a tree of parameters."""
    if isinstance(tree, dict):
        return sum(held(part) for part in tree.values())
    if isinstance(tree, list):
        return sum(held(part) for part in tree)
    return int(tree.nbytes)
