"""Weights from a source to the device: one tensor a parameter, in the tree that the model code reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import Resolved
from engine.mesh import shard_shape
from engine.model import quant
from engine.model.params import params
from engine.model.spec import ModelSpec
from engine.model.weights import WeightSource, read_part
from models_torch.packed import pack
from models_torch.quantised import Quantised

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {"bfloat16": (np.uint16, torch.bfloat16), "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn)}
INNER = {"q": 1, "k": 1, "v": 1, "out": 2, "gate": 1, "up": 1, "down": 1, "head": 1}
"""Last part of a matrix's name -> how many trailing dimensions a product sums over."""


def upload(
    spec: ModelSpec, config: Resolved, source: WeightSource, device: torch.device, rank: int = 0
) -> dict[str, Any]:
    """Read this rank's part of every parameter: {"embed": ..., "layers": [{"attention": {"q": ...}}], ...}, on
    `device`: in the dtype of activations, but for what is quantised (engine.model.quant).

    On a CPU the matrices of a 16-bit checkpoint are packed where that is possible (models_torch.packed).
    Raises ModelError naming the tensor.
    """
    tree: dict[str, Any] = {"layers": [{} for _ in spec.layers]}
    dtype = DTYPES[config.dtype]
    for name, p in params(spec).items():
        *path, leaf = name.split(".")
        at: Any = tree
        for part in path:
            at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
        made = quant.form(p, config.quantise)
        if made is not None:
            at[leaf] = _quantised(made, config, source, device, rank)
            continue
        value = as_tensor(read_part(source, p, config.mesh, {"tp": rank}))
        inner = 1 if name == "embed" and spec.tied else INNER.get(leaf)
        if p.axes[0] == "experts" and inner and device.type == "cpu":
            at[leaf] = [_placed(one, inner, dtype, device) for one in value]
        else:
            at[leaf] = _placed(value, inner, dtype, device, name == "embed")
    return tree


def _quantised(made: quant.Form, config: Resolved, source: WeightSource, device: torch.device, rank: int) -> Quantised:
    """This rank's part of a quantised matrix."""
    body, scale = made.cut(*quant.read_quantised(source, made), config.mesh, {"tp": rank})
    return Quantised(
        shape=shard_shape(made.param.shape, made.param.axes, config.mesh),
        body=as_tensor(body).to(device),
        scale=as_tensor(scale).to(device),
        by=quant.BY[made.kind],
        exact=config.deterministic,
    )


def _placed(
    value: torch.Tensor, inner: int | None, dtype: torch.dtype, device: torch.device, embed: bool = False
) -> Any:
    """A parameter on its device, packed where that is possible. inner: as INNER has it, None for no matrix."""
    packed = pack(value, inner, dtype, embed) if device.type == "cpu" and inner else None
    return value.to(device=device, dtype=dtype) if packed is None else packed


def as_tensor(read: NDArray[Any]) -> torch.Tensor:
    """A copy of an array on the CPU. torch doesn't know the dtypes of ml_dtypes: it takes the bits."""
    if read.dtype.name in BITS:
        bits, dtype = BITS[read.dtype.name]
        return torch.from_numpy(np.ascontiguousarray(read).view(bits).copy()).view(dtype)
    return torch.from_numpy(read.copy())


def held(tree: Any) -> int:
    """Bytes of a tree of parameters."""
    if isinstance(tree, dict):
        return sum(held(part) for part in tree.values())
    if isinstance(tree, list):
        return sum(held(part) for part in tree)
    return int(tree.nbytes)
