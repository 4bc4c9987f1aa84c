"""How layers are run: scanned over stacked weights, or one by one over a list. The layer functions don't know.

Scanned compiles fast and small and copies nothing on TPU; on GPU and CPU XLA copies each layer's slice of a stack, so
there a list is unrolled, unless it is small (docs/decisions/0004-stacked-or-listed.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from engine.model.groups import Place, places
from engine.model.spec import Layer, ModelSpec
from models_jax.stacked import Stacked

Step: TypeAlias = tuple[jax.Array, Any, dict[str, jax.Array]]
Body: TypeAlias = Callable[[Layer, Mapping[str, Any], jax.Array, Any, Place], Step]


def run(spec: ModelSpec, layers: Any, x: jax.Array, cache: Any, body: Body, taps: Sequence[str]) -> Step:
    """All layers, in order. layers: a list of trees, one a layer, is unrolled; a tuple of trees, one for each layer of
    the repeating pattern with leaves stacked [repeats, ...], is scanned. What is Stacked is not sliced but handed on
    whole, with the layer's index in it."""
    return (_unrolled if isinstance(layers, list) else _scanned)(spec, layers, x, cache, body, taps)


def _unrolled(spec: ModelSpec, layers: list[Any], x: jax.Array, cache: Any, body: Body, taps: Sequence[str]) -> Step:
    at = places(spec)
    found: dict[str, jax.Array] = {}
    for i, p in enumerate(layers):
        x, cache, inner = body(spec.layers[i], p, x, cache, at[i])
        found |= _wanted(i, inner, taps)
    return x, cache, found


def _scanned(
    spec: ModelSpec, layers: tuple[Any, ...], x: jax.Array, cache: Any, body: Body, taps: Sequence[str]
) -> Step:
    at = places(spec)
    period, repeats = len(layers), len(spec.layers) // len(layers)
    stride = [sum(place.group == at[r].group for place in at[:period]) for r in range(period)]
    leaves, tree = jax.tree.flatten(layers, is_leaf=lambda x: isinstance(x, Stacked))
    sliced = [None if isinstance(leaf, Stacked) else leaf for leaf in leaves]

    def once(carry: tuple[jax.Array, Any], xs: tuple[jax.Array, list[Any]]) -> tuple[tuple[jax.Array, Any], Any]:
        (x, cache), (j, slices), inners = carry, xs, []
        held = [
            Stacked(body=a.body, layer=j) if isinstance(a, Stacked) else b for a, b in zip(leaves, slices, strict=True)
        ]
        params = jax.tree.unflatten(tree, held)
        for r in range(period):
            place = Place(at[r].group, at[r].rank + j * stride[r])
            x, cache, inner = body(spec.layers[r], params[r], x, cache, place)
            inners.append(inner if taps else {})
        return (x, cache), inners

    (x, cache), ys = jax.lax.scan(once, (x, cache), (jnp.arange(repeats), sliced))
    found: dict[str, jax.Array] = {}
    for i in range(len(spec.layers)):
        found |= _wanted(i, {k: v[i // period] for k, v in ys[i % period].items()}, taps)
    return x, cache, found


def _wanted(i: int, inner: Mapping[str, jax.Array], taps: Sequence[str]) -> dict[str, jax.Array]:
    return {f"layers.{i}{k}": v for k, v in inner.items() if f"layers.{i}{k}" in taps}
