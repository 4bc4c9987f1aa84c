"""Safetensors files: headers are read and checked, tensors are views of the mapped file. Nothing is ever unpickled.

Format: https://github.com/huggingface/safetensors, "Format". 8 bytes little-endian header length, JSON header, data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError
from engine.model.registry import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
FLOAT8 = "F8_E4M3"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """Where a tensor lies. start, stop: bytes of `file`, whose header calls the type `dtype`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def view(self, data: NDArray[np.uint8]) -> NDArray[Any]:
        """The tensor as a read-only view of its mapped file. dtype must be one of DTYPES."""
        return data[self.start : self.stop].view(DTYPES[self.dtype]).reshape(self.shape)


def open_folder(folder: Path) -> dict[str, Tensor]:
    """name -> Tensor over the folder's model.safetensors, or over the files that model.safetensors.index.json names.

    Raises ModelError naming the file or the tensor at fault; reads headers only.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise ModelError(f"{folder}: holds both {SINGLE} and {INDEX}; remove the one that is stale", field=INDEX)
    if single.is_file():
        return {t.name: t for t in read_header(single)}
    if index.is_file():
        return _sharded(index)
    pickled = sorted(f.name for f in folder.glob("*") if f.suffix in PICKLED)
    if pickled:
        what = f"{pickled[0]} is a pickle, which can run code, and is never read; convert it to safetensors"
        raise ModelError(f"{folder}: holds no {SINGLE}; {what}", field=pickled[0])
    raise ModelError(f"{folder}: holds neither {SINGLE} nor {INDEX}; copy the weights there", field=SINGLE)


def read_header(file: Path) -> list[Tensor]:
    """The tensors of one file, in the order of their bytes. Raises ModelError naming the file or the tensor."""
    header, at, size = _header(file)
    tensors = []
    for name, entry in header.items():
        if not _well_formed(entry):
            _refuse(file, f"corrupted header at tensor {name!r}", name)
        shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
        tensors.append(
            Tensor(name=name, file=file, dtype=entry["dtype"], shape=shape, start=at + start, stop=at + stop)
        )
    tensors.sort(key=lambda t: (t.start, t.stop))
    end = at
    for t in tensors:
        if t.stop > size:
            _refuse(file, f"truncated: tensor {t.name!r} ends at byte {t.stop} of {size}", t.name)
        if t.start != end:
            _refuse(file, f"corrupted header: tensor {t.name!r} does not start where the one before ends", t.name)
        wanted = math.prod(t.shape) * DTYPES[t.dtype].itemsize if t.dtype in DTYPES else t.stop - t.start
        if t.stop - t.start != wanted:
            what = f"tensor {t.name!r} of shape {list(t.shape)} has {t.stop - t.start} bytes, not {wanted}"
            _refuse(file, f"corrupted header: {what}", t.name)
        end = t.stop
    if end != size:
        _refuse(file, f"{size - end} bytes follow the last tensor", file.name)
    return tensors


def _refuse(file: Path, what: str, name: str) -> NoReturn:
    raise ModelError(f"{file}: {what}; copy or download it again", field=name)


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header's entries of tensors, where the data starts, and the size of the file, both in bytes."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                _refuse(file, f"truncated, or not safetensors: a header of {length} bytes in {size}", file.name)
            header = json.loads(f.read(length), object_pairs_hook=_unique)
    except OSError as e:
        raise ModelError(f"{file}: can't be read: {e.strerror}", field=file.name) from e
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{file}: corrupted header ({e}); copy or download it again", field=file.name) from e
    if not isinstance(header, dict):
        _refuse(file, "corrupted header (no object)", file.name)
    header.pop("__metadata__", None)
    return header, 8 + length, size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _well_formed(entry: Any) -> bool:
    """{"dtype": str, "shape": [n, ...], "data_offsets": [start, stop]} with whole numbers from 0."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    for field in ("shape", "data_offsets"):
        numbers = entry.get(field)
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            return False
    return len(entry["data_offsets"]) == 2


def _sharded(index: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index names, each where the index says and nowhere else."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        _refuse(index, "has no weight_map", "weight_map")
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            _refuse(index, f"puts tensor {name!r} in {file!r}, which is not a safetensors file of this folder", name)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(placed.values())):
        path = index.parent / file
        if not path.is_file():
            name = next(n for n, f in placed.items() if f == file)
            _refuse(index, f"names {file} (for tensor {name!r}), which is not there", file)
        for t in read_header(path):
            if placed.get(t.name) != file:
                where = f"says {placed[t.name]}" if t.name in placed else "does not name it"
                _refuse(index, f"tensor {t.name!r} stands in {file}, but the index {where}", t.name)
            tensors[t.name] = t
    for name, file in placed.items():
        if name not in tensors:
            _refuse(index, f"tensor {name!r} is not in {file}, where the index puts it", name)
    return tensors
