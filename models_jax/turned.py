"""Matrices as a CPU multiplies them fastest (docs/decisions/0004-stacked-or-listed.md has figures)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Turned:
    """A matrix that stands input first: body [*in, *out], where the parameter is [*out, *in]."""

    body: Any
