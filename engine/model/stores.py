"""The tensors of a model's folder, whatever holds them: safetensors or Orbax, with checksums or without."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError
from engine.model import manifest, orbax
from engine.model.lazy import Box, Fetch
from engine.model.manifest import Manifest
from engine.model.orbax import FOLDER, Stored
from engine.model.shards import DTYPES, INDEX, SINGLE, Tensor, open_folder


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """name -> Tensor. Where the folder has checksums.json, what is read of a tensor is verified.

    Raises ModelError naming the file or the tensor at fault; reads headers only.
    """
    if orbax.holds(folder):
        double = next((n for n in (SINGLE, INDEX) if (folder / n).is_file()), None)
        if double is not None:
            raise ModelError(f"{folder}: holds both {FOLDER} and {double}; remove the one that is stale", field=double)
        found: dict[str, Tensor] = dict(orbax.open_arrays(folder))
    else:
        found = dict(open_folder(folder))
    made = manifest.find(folder)
    return found if made is None else _verified(folder, found, made)


def map_file(file: Path) -> NDArray[np.uint8]:
    """The bytes of a file of tensors, mapped; none for a folder, whose tensors read themselves."""
    return np.empty(0, np.uint8) if file.is_dir() else np.asarray(np.memmap(file, np.uint8, "r"))


def equal(a: Any, b: Any, block: int) -> bool:
    """Whether two arrays of one shape and dtype are equal bit for bit. block: bytes that are looked at at once."""
    rows = max(1, block // max(1, math.prod(a.shape[1:]) * a.dtype.itemsize))
    parts = ((np.ascontiguousarray(x[i : i + rows]) for x in (a, b)) for i in range(0, len(a), rows))
    return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in parts)


def fetch_of(tensor: Tensor, data: NDArray[np.uint8]) -> Fetch:
    """What reads a part of a tensor. data: its file, mapped."""
    if isinstance(tensor, Stored):
        return tensor.fetch
    value: NDArray[Any] = tensor.view(data)

    def fetch(box: Box) -> NDArray[Any]:
        return value[box]

    return fetch


def _verified(folder: Path, found: dict[str, Tensor], made: Manifest) -> dict[str, Tensor]:
    """The tensors, each reading through its checksums."""
    for name in (*found, *made.tensors):
        if name not in made.tensors or name not in found:
            where = f"has no checksum in {manifest.FILE}" if name in found else f"of {manifest.FILE} is missing"
            raise ModelError(f"{folder}: tensor {name!r} {where}; copy or convert it again", field=name)
    files = {t.file: map_file(t.file) for t in found.values()}
    out: dict[str, Tensor] = {}
    for name, tensor in found.items():
        entry = made.tensors[name]
        if (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
            raise ModelError(
                f"{tensor.file}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, {manifest.FILE} says "
                f"{entry.dtype} {list(entry.shape)}; copy or convert it again",
                field=name,
            )
        if tensor.dtype not in DTYPES:
            out[name] = tensor
            continue
        out[name] = Stored(
            name=name,
            file=tensor.file,
            dtype=tensor.dtype,
            shape=tensor.shape,
            start=tensor.start,
            stop=tensor.stop,
            fetch=manifest.checked(name, tensor.file, entry, fetch_of(tensor, files[tensor.file])),
            chunk=entry.chunk,
        )
    return out
