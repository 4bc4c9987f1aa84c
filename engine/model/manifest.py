"""sha256 of every tensor of a folder, whole and in pieces, so that a shard is verified by the bytes that it reads."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError
from engine.model.lazy import Box, Fetch
from engine.model.registry import read_json

FILE = "checksums.json"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor. dtype: as safetensors writes it. chunk: shape of a piece (the last ones may be smaller). sha256: of its
    bytes, row by row; chunks: of each piece, in the order of their indices."""

    dtype: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    sha256: str
    chunks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A safetensors file that the tensors came from: their names in the order of their bytes, and its metadata."""

    tensors: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a folder's checksums.json holds."""

    tensors: Mapping[str, Entry]
    files: Mapping[str, File]


def digest(part: NDArray[Any]) -> str:
    """sha256 of an array's bytes, row by row."""
    return hashlib.sha256(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data).hexdigest()


def pieces(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[int, Box]]:
    """(number, box) of each piece, the last axis running fastest."""
    counts = [range(-(-n // c)) for n, c in zip(shape, chunk, strict=True)]
    for number, at in enumerate(itertools.product(*counts)):
        yield number, tuple(slice(i * c, min(n, i * c + c)) for i, c, n in zip(at, chunk, shape, strict=True))


def enter(value: NDArray[Any], dtype: str, chunk: Sequence[int]) -> Entry:
    """The entry of a tensor."""
    return Entry(
        dtype=dtype,
        shape=value.shape,
        chunk=tuple(chunk),
        sha256=digest(value),
        chunks=tuple(digest(value[box]) for _, box in pieces(value.shape, chunk)),
    )


def checked(name: str, where: Path, entry: Entry, fetch: Fetch) -> Fetch:
    """`fetch` that reads whole pieces and verifies each once. Raises ModelError naming the tensor."""
    seen: set[int] = set()
    counts = [-(-n // c) for n, c in zip(entry.shape, entry.chunk, strict=True)]

    def get(box: Box) -> NDArray[Any]:
        firsts = [s.start // c for s, c in zip(box, entry.chunk, strict=True)]
        ends = [-(-s.stop // c) for s, c in zip(box, entry.chunk, strict=True)]
        around = [
            slice(a * c, min(n, b * c)) for a, b, c, n in zip(firsts, ends, entry.chunk, entry.shape, strict=True)
        ]
        block = fetch(tuple(around))
        for at in itertools.product(*(range(a, b) for a, b in zip(firsts, ends, strict=True))):
            number = int(np.ravel_multi_index(at, counts)) if counts else 0
            if number not in seen:
                lows = [(i - a) * c for i, a, c in zip(at, firsts, entry.chunk, strict=True)]
                part = block[tuple(slice(low, low + c) for low, c in zip(lows, entry.chunk, strict=True))]
                if digest(part) != entry.chunks[number]:
                    raise ModelError(
                        f"{where}: tensor {name!r} is damaged: piece {list(at)} does not have the sha256 that {FILE} "
                        "says; copy or convert it again",
                        field=name,
                    )
                seen.add(number)
        return block[tuple(slice(s.start - a.start, s.stop - a.start) for s, a in zip(box, around, strict=True))]

    return get


def write(folder: Path, manifest: Manifest) -> None:
    """To the folder's checksums.json."""
    content = {"format": FORMAT, **asdict(manifest)}
    (folder / FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def find(folder: Path) -> Manifest | None:
    """The folder's manifest, None where it has none. Raises ModelError: not as `write` makes it."""
    file = folder / FILE
    if not file.is_file():
        return None
    content = read_json(file)
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, not {FORMAT}")
        tensors = {
            name: Entry(
                dtype=e["dtype"],
                shape=tuple(e["shape"]),
                chunk=tuple(e["chunk"]),
                sha256=e["sha256"],
                chunks=tuple(e["chunks"]),
            )
            for name, e in content["tensors"].items()
        }
        files = {
            name: File(tensors=tuple(f["tensors"]), metadata=dict(f["metadata"]))
            for name, f in content["files"].items()
        }
        for name, e in tensors.items():
            count = math.prod(-(-n // c) for n, c in zip(e.shape, e.chunk, strict=True))
            if count != len(e.chunks):
                raise ValueError(f"tensor {name!r} has {len(e.chunks)} pieces, not {count}")
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(f"{file}: not a manifest ({error}); convert the checkpoint again", field=FILE) from error
    return Manifest(tensors=tensors, files=files)
