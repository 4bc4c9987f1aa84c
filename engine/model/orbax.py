"""An Orbax checkpoint's arrays, read by tensorstore: neither jax nor orbax is imported, and a slice reads its chunks.

Format: https://orbax.readthedocs.io, "Checkpoint format": _METADATA names the arrays, each is a zarr array, all of them
in one OCDBT store, or each in a folder of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError
from engine.model.lazy import Box, Fetch, Lazy
from engine.model.registry import read_json
from engine.model.shards import DTYPES, Tensor

FOLDER = "orbax"
"""Of a model's folder, beside config.json: the checkpoint."""
METADATA = "_METADATA"
NAMES = {str(dtype): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored(Tensor):
    """A tensor that isn't a piece of a file. chunk: shape of what is read at once."""

    fetch: Fetch
    chunk: tuple[int, ...]

    def view(self, data: NDArray[np.uint8]) -> Any:
        """The tensor, read when it is looked at."""
        return Lazy(self.fetch, DTYPES[self.dtype], self.shape)


def holds(folder: Path) -> bool:
    """Whether a model's folder has an Orbax checkpoint."""
    return (folder / FOLDER / METADATA).is_file()


def open_arrays(folder: Path) -> dict[str, Stored]:
    """name -> tensor of the checkpoint in folder/orbax; the name is the path in its tree, joined by dots.

    Raises ModelError naming what can't be read.
    """
    try:
        import tensorstore as ts
    except ModuleNotFoundError as missing:
        raise ModelError(
            f"{folder}: an Orbax checkpoint needs the package tensorstore: pip install 'radixmesh[convert]'",
            field="model",
        ) from missing
    at = folder / FOLDER
    found = read_json(at / METADATA)
    try:
        names = [
            ".".join(str(k["key"]) for k in entry["key_metadata"])
            for entry in found["tree_metadata"].values()
            if not entry["value_metadata"].get("skip_deserialize")
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{at / METADATA}: not as Orbax writes it ({error!r})", field=METADATA) from error
    driver = "zarr3" if found.get("use_zarr3") else "zarr"
    waiting = {
        name: ts.open({"driver": driver, "kvstore": _place(at, name, found)}, open=True, read=True) for name in names
    }
    out = {}
    for name, future in waiting.items():
        try:
            store: Any = future.result()
        except (ValueError, OSError) as error:
            raise ModelError(f"{at}: array {name!r} can't be read: {_first(error)}", field=name) from error
        dtype = store.dtype.name
        out[name] = Stored(
            name=name,
            file=at,
            dtype=NAMES.get(dtype, dtype),
            shape=tuple(store.shape),
            start=0,
            stop=0,
            fetch=_fetch(name, at, store),
            chunk=tuple(int(n) for n in store.chunk_layout.read_chunk.shape or ()),
        )
    return out


def _place(at: Path, name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Where an array's keys are."""
    if found.get("use_ocdbt", True):
        return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{at}/"}, "path": f"{name}/"}
    return {"driver": "file", "path": f"{at / name}/"}


def _fetch(name: str, at: Path, store: Any) -> Fetch:
    def fetch(box: Box) -> NDArray[Any]:
        try:
            value: NDArray[Any] = store[box].read().result()
        except (ValueError, OSError) as error:
            raise ModelError(
                f"{at}: tensor {name!r} is damaged: {_first(error)}; copy or convert it again", field=name
            ) from error
        return value

    return fetch


def _first(error: Exception) -> str:
    """What an error says, in one line that is not too long."""
    said = " ".join(str(error).split())
    return said if len(said) <= 200 else said[:197] + "..."
