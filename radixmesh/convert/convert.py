"""A model's folder in another form: the same tensors bit for bit, with a sha256 of each, and every other file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.errors import ConfigError, ModelError
from engine.model import manifest, orbax
from engine.model.manifest import Entry, Manifest
from engine.model.shards import DTYPES, INDEX, PICKLED, Tensor
from engine.model.stores import map_file, open_tensors
from radixmesh.convert import files

FORMS = ("orbax", "safetensors")
PARTIAL = ".partial"
"""Ends the name of a folder that is being written."""
WEIGHTS = (".safetensors", *PICKLED, ".gguf", ".h5", ".msgpack", ".onnx")
"""Ends of names of files that hold weights, in whatever form; they are not carried along."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """tensors, bytes: written and read back. known: the source had checksums, and every tensor agreed with them.
    carried, left: names of the other files, and of what was left behind: folders, and weights in another form."""

    tensors: int
    bytes: int
    known: bool
    carried: tuple[str, ...]
    left: tuple[str, ...]


class Source:
    """The tensors of a folder as real arrays, one at a time; of safetensors a view of the mapped file."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError naming the tensor that can't be converted."""
        self.tensors = open_tensors(folder)
        self._files = {t.file: map_file(t.file) for t in self.tensors.values()}
        for t in self.tensors.values():
            if t.dtype not in DTYPES:
                what = f"tensor {t.name!r} has dtype {t.dtype}; {', '.join(DTYPES)} can be converted"
                raise ModelError(f"{t.file}: {what}", field=t.name)

    def __getitem__(self, name: str) -> files.Array:
        tensor = self.tensors[name]
        return np.asarray(tensor.view(self._files[tensor.file]))


def convert(source: Path, target: Path, form: str, note: Callable[[str], None] = lambda text: None) -> Converted:
    """Write `target`, a folder that is not there yet or is empty. note: told what is being done.

    Everything is written to a folder beside it, read back and compared before it gets its name.
    Raises ConfigError, ModelError naming the tensor.
    """
    if form not in FORMS:
        raise ConfigError(f"to: must be one of {', '.join(FORMS)}, not {form!r}", field="to")
    if not source.is_dir():
        raise ModelError(f"model {source}: is not a folder", field="model")
    if form == ("orbax" if orbax.holds(source) else "safetensors"):
        raise ConfigError(f"to: {source} is in {form} already", field="to")
    partial = target.with_name(target.name + PARTIAL)
    for folder in (target, partial):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"target {folder}: is there already; remove it, or give another", field="target")
    read, known = Source(source), manifest.find(source)
    partial.mkdir(parents=True, exist_ok=True)
    note(f"writing {len(read.tensors)} tensors")
    made = _to_orbax(read, partial) if form == "orbax" else _to_safetensors(read, partial, known)
    manifest.write(partial, made)
    note("reading back")
    verify(partial, made.tensors)
    carried, left = _carry(source, partial)
    if target.exists():
        target.rmdir()
    partial.rename(target)
    total = sum(DTYPES[e.dtype].itemsize * int(np.prod(e.shape)) for e in made.tensors.values())
    return Converted(tensors=len(made.tensors), bytes=total, known=known is not None, carried=carried, left=left)


def verify(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Read every tensor of a folder, its pieces through their checksums and the whole against an entry.

    Raises ModelError naming the tensor.
    """
    found = Source(folder)
    for name, entry in entries.items():
        if manifest.digest(found[name]) != entry.sha256:
            raise ModelError(
                f"{folder}: tensor {name!r} does not read back as it was written; convert again", field=name
            )


def _to_orbax(source: Source, folder: Path) -> Manifest:
    """Entries are of what was read, in the pieces that were written."""
    from radixmesh.convert.save import save

    save(folder / orbax.FOLDER, {name: source[name] for name in source.tensors})
    pieces = {name: stored.chunk for name, stored in orbax.open_arrays(folder).items()}
    entries = {n: manifest.enter(source[n], t.dtype, pieces[n]) for n, t in source.tensors.items()}
    return Manifest(tensors=entries, files=files.layout_of(source.tensors))


def _to_safetensors(source: Source, folder: Path, known: Manifest | None) -> Manifest:
    """The files that the tensors came from once, where that is known; else as many as their size asks for."""
    placed = known.files if known is not None and known.files else files.place(source.tensors)
    entries: dict[str, Entry] = {}

    def take(name: str) -> files.Array:
        value = source[name]
        entries[name] = manifest.enter(value, source.tensors[name].dtype, _piece(source.tensors[name]))
        return value

    files.save(folder, placed, source.tensors, take)
    return Manifest(tensors={n: entries[n] for n in source.tensors}, files=placed)


def _piece(tensor: Tensor) -> tuple[int, ...]:
    """As it was stored."""
    return tensor.chunk if isinstance(tensor, orbax.Stored) else tensor.shape


def _carry(source: Path, target: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copy the files that hold no weights. Names of those copied, and of those left."""
    carried, left = [], []
    for file in sorted(source.iterdir()):
        if file.name in (orbax.FOLDER, manifest.FILE, INDEX) or file.suffix == ".safetensors":
            continue
        if file.is_file() and file.suffix not in WEIGHTS and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
            carried.append(file.name)
        else:
            left.append(file.name)
    return tuple(carried), tuple(left)
