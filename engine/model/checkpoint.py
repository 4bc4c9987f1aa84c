"""A folder of safetensors as a WeightSource. Every tensor fills one parameter, every parameter has one tensor."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError
from engine.model.params import Param, params
from engine.model.registry import FAMILIES
from engine.model.shards import DTYPES, Tensor
from engine.model.spec import ModelSpec
from engine.model.stores import equal, map_file, open_tensors

BLOCK = 1 << 26
"""Bytes compared at once where a tied head stands beside its embedding."""


class Checkpoint:
    """The weights in a folder, of safetensors or of Orbax (engine.model.stores says where they lie).

    Reads headers when opened, and of the data only the bytes that `read` is asked for
    (and, where the head is tied and stored all the same, the embedding and the head, which must be equal)."""

    def __init__(self, path: str | Path, spec: ModelSpec) -> None:
        """Raises ModelError naming the file at fault, or the tensor: unused, missing, of a wrong shape or dtype."""
        family, layers = FAMILIES[spec.family], range(len(spec.layers))
        found = open_tensors(Path(path))
        self._params = params(spec)
        self._files = {t.file: map_file(t.file) for t in found.values()}
        for pattern in family.BUFFERS:
            for name in _expand(pattern, layers):
                found.pop(name, None)
        names = {
            param: name
            for rule in family.RULES.items()
            for name, param in zip(_expand(rule[0], layers), _expand(rule[1], layers), strict=True)
        }
        if spec.tied and names["head"] in found and names["embed"] in found:
            self._check_tied(found.pop(names["head"]), found[names["embed"]])
        _check_names(Path(path), found, dict.fromkeys(names[p] for p in self._params))
        self._tensors = {p: found[names[p]] for p in self._params}
        for param in self._params.values():
            _check(self._tensors[param.name], param)

    def read(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
        """The slice `part` of a parameter, as a read-only view of the file where its bytes are aligned, or a copy."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelError(f"no parameter is called {name!r}", field=name)
        whole = tensor.view(self._files[tensor.file]).reshape(self._params[name].shape)
        return np.require(whole[part], requirements="A")

    def _check_tied(self, head: Tensor, embed: Tensor) -> None:
        """A head stored beside the embedding that it is tied to must equal it, bit for bit."""
        a, b = (t.view(self._files[t.file]) if t.dtype in DTYPES else None for t in (head, embed))
        same = (head.dtype, head.shape) == (embed.dtype, embed.shape)
        if not same or a is None or b is None or not equal(a, b, BLOCK):
            what = f"tie_word_embeddings is true, but tensor {head.name!r} differs from {embed.name!r}"
            raise ModelError(f"{head.file}: {what}; set it to false or remove the tensor", field=head.name)


def _expand(pattern: str, layers: range) -> list[str]:
    """A name with {i} written out for every layer."""
    return [pattern.replace("{i}", str(i)) for i in layers] if "{i}" in pattern else [pattern]


def _check_names(folder: Path, found: Collection[str], wanted: Collection[str]) -> None:
    """Refuse tensors that fill no parameter, and parameters that no tensor fills."""
    unused = [n for n in found if n not in wanted]
    missing = [n for n in wanted if n not in found]
    faults = [f"tensor {n!r} belongs to no parameter" for n in unused] + [f"tensor {n!r} is missing" for n in missing]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        what = "; ".join(faults[:3]) + more
        raise ModelError(f"{folder}: {what}; config.json and weights don't match", field=(unused + missing)[0])


def _check(tensor: Tensor, param: Param) -> None:
    """Refuse a tensor of another shape than the parameter's as stored, or of a dtype that is not a plain float."""
    at = f"{tensor.file}: tensor {tensor.name!r}"
    shape = stored_shape(param)
    if tensor.shape != shape:
        what = f"{at} has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
        raise ModelError(f"{what}; they are not of one model", field=tensor.name)
    if tensor.dtype not in DTYPES:
        raise ModelError(f"{at} has dtype {tensor.dtype}; {', '.join(DTYPES)} are supported", field=tensor.name)


def stored_shape(param: Param) -> tuple[int, ...]:
    """A parameter's shape in the file, where heads and their dimensions are one: [q_heads * head, hidden] for q."""
    out: list[int] = []
    for i, (size, axis) in enumerate(zip(param.shape, param.axes, strict=True)):
        if axis == "head" and i and param.axes[i - 1] in ("q_heads", "kv_heads"):
            out[-1] *= size
        else:
            out.append(size)
    return tuple(out)
