"""Safetensors files, written one tensor at a time, header and order as the library writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.model.manifest import File
from engine.model.registry import read_json
from engine.model.shards import DTYPES, INDEX, SINGLE, Tensor

Array: TypeAlias = NDArray[Any]
SHARD = 5_000_000_000
"""Bytes of tensors that a file holds at most, where nothing says how they were split; a larger one stands alone."""


def size(tensor: Tensor) -> int:
    """Bytes."""
    return math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, File]:
    """The files that hold tensors of safetensors: which, in which order, with which metadata. The index stands among
    them, with its metadata and no tensors."""
    order = sorted(tensors.values(), key=lambda t: (t.file, t.start, t.stop))
    out = {
        file.name: File(tensors=tuple(t.name for t in order if t.file == file), metadata=_metadata(file))
        for file in dict.fromkeys(t.file for t in order)
    }
    index = order[0].file.with_name(INDEX)
    if index.is_file():
        out[INDEX] = File(tensors=(), metadata=read_json(index).get("metadata") or {})
    return out


def _metadata(file: Path) -> dict[str, Any]:
    """Of a file whose header was checked."""
    with file.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    found: dict[str, Any] = header.get("__metadata__", {})
    return found


def place(tensors: Mapping[str, Tensor]) -> dict[str, File]:
    """Files for tensors that came from none: in the order of their names, up to SHARD bytes each."""
    groups: list[list[str]] = [[]]
    held = 0
    for name in sorted(tensors):
        if groups[-1] and held + size(tensors[name]) > SHARD:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size(tensors[name])
    metadata = {"format": "pt"}  # transformers asks for it
    if len(groups) == 1:
        return {SINGLE: File(tensors=tuple(groups[0]), metadata=metadata)}
    out = {
        f"model-{i + 1:05}-of-{len(groups):05}.safetensors": File(tensors=tuple(names), metadata=metadata)
        for i, names in enumerate(groups)
    }
    out[INDEX] = File(tensors=(), metadata={"total_size": sum(size(t) for t in tensors.values())})
    return out


def save(folder: Path, placed: Mapping[str, File], tensors: Mapping[str, Tensor], take: Callable[[str], Array]) -> None:
    """Write the files. take: a tensor's values, asked for once each."""
    where = {name: file for file, content in placed.items() for name in content.tensors}
    for file, content in placed.items():
        if file == INDEX:
            index = {"metadata": content.metadata, "weight_map": where}
            (folder / file).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            continue
        with (folder / file).open("wb") as out:
            out.write(_header(content, tensors))
            for name in content.tensors:
                out.write(np.ascontiguousarray(take(name)).reshape(-1).view(np.uint8).data)


def _header(content: File, tensors: Mapping[str, Tensor]) -> bytes:
    """Length and JSON, padded so that the data starts at a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": content.metadata} if content.metadata else {}
    at = 0
    for name in content.tensors:
        t = tensors[name]
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + size(t)]}
        at += size(t)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
