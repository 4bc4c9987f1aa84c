"""What others may know of the prefix cache: pages that came and went, as vLLM's KV events tell it.

A page's hash covers its tokens, all tokens before it, the namespace and the version of the weights. It is the same in
every process. A router that keeps the hashes knows which engine holds which prefix.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStored:
    """Pages that follow each other were cached. hashes: one a page; parent: of the page before, None at the start.
    tokens: len(hashes) * page ids. namespace: as the request had it."""

    hashes: tuple[int, ...]
    parent: int | None
    tokens: tuple[int, ...]
    page: int
    namespace: Hashable


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRemoved:
    """Pages are cached no more."""

    hashes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AllBlocksCleared:
    """Nothing is cached."""


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


def chain(key: bytes, width: int, parent: int | None, space: tuple[int, Hashable]) -> tuple[int, ...]:
    """The hashes of a key's pages of `width` bytes each. parent: hash of the page before; None begins a prefix, then
    space, the weights' version and the namespace, is hashed in its place."""
    before, out = repr(space).encode() if parent is None else parent.to_bytes(8, "little"), []
    for at in range(0, len(key), width):
        before = blake2b(before + key[at : at + width], digest_size=8).digest()
        out.append(int.from_bytes(before, "little"))
    return tuple(out)
