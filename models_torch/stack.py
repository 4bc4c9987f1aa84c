"""How layers are run: one by one over a list, on every torch device. The layer functions don't know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from engine.model.groups import Place, places
from engine.model.spec import Layer, ModelSpec
from models_torch.ops import Stream, whole

Step: TypeAlias = tuple[Stream, Any, dict[str, Any]]
Body: TypeAlias = Callable[[Layer, Mapping[str, Any], Stream, Any, Place], Step]


def run(
    spec: ModelSpec, layers: Sequence[Mapping[str, Any]], x: Stream, cache: Any, body: Body, taps: Sequence[str]
) -> Step:
    """All layers, in order."""
    at = places(spec)
    found: dict[str, torch.Tensor] = {}
    for i, p in enumerate(layers):
        x, cache, inner = body(spec.layers[i], p, x, cache, at[i])
        if taps:
            found |= {f"layers.{i}{k}": whole(v) for k, v in inner.items() if f"layers.{i}{k}" in taps}
    return x, cache, found
