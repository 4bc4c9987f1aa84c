"""Weights of a scan that a kernel reads where they lie: a slice of them would be a copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Stacked:
    """body [layers, ...]; layer int32[]: which of them is meant, None outside of a scan."""

    body: Any
    layer: Any = None

    def take(self) -> jax.Array:
        """The layer's own, [...]."""
        return jax.lax.dynamic_index_in_dim(self.body, self.layer, keepdims=False)


def whole(array: Any) -> tuple[Any, Any]:
    """(all that is there, which of it), as kernels take it; None is all of it."""
    return (array.body, array.layer) if isinstance(array, Stacked) else (array, None)


def plain(array: Any) -> Any:
    """An array of one layer."""
    return array.take() if isinstance(array, Stacked) else array


def entry(array: Any, index: Any) -> jax.Array:
    """One entry along the first dimension of a layer's array, and no more of it."""
    return array.body[array.layer, index] if isinstance(array, Stacked) else array[index]
