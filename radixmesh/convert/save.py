"""An Orbax checkpoint, written by orbax itself: what `PyTreeCheckpointer().restore` gives back in a JAX program."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, ModelError
from radixmesh.convert.files import Array

PIECES, SMALLEST, LARGEST = 16, 1 << 17, 1 << 20
"""An array is cut into so many pieces that are read one by one, within these bounds (bytes): small enough that a shard
along either axis reads little more than itself, large enough that a file system is not slowed by it."""


def save(folder: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays as the tree that the dots of their names make: {"model": {"norm": {"weight": ...}}}.

    Raises ConfigError without orbax, ModelError for a name that is a branch and a leaf, or an array of no size.
    """
    tree: dict[str, Any] = {}
    for name, value in arrays.items():
        *path, leaf = name.split(".")
        at = tree
        for part in path:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                break
        if not isinstance(at, dict) or leaf in at or not all((*path, leaf)):
            raise ModelError(f"tensor {name!r}: has no place in a tree, another stands there", field=name)
        if not value.size:
            raise ModelError(f"tensor {name!r}: is empty, which Orbax can't hold", field=name)
        at[leaf] = value
    try:
        import jax
        import orbax.checkpoint as ocp
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"to: writing Orbax needs the package {missing.name}: pip install 'radixmesh[convert]'", field="to"
        ) from missing
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")  # files are written; no device is needed, and none is taken
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it warns of small pieces
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
            pieces = jax.tree.map(lambda x: ocp.SaveArgs(chunk_byte_size=piece(x)), tree)
            writer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree, save_args=pieces))
    finally:
        logger.setLevel(before)


def piece(value: Array) -> int:
    """Bytes that a piece of an array may have."""
    return min(LARGEST, max(value.nbytes // PIECES, SMALLEST))
