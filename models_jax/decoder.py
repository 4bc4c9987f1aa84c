"""A decoder-only model in local view: a function states what one device does and names the axis of a reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.model.spec import Layer, ModelSpec
from models_jax import ops, stack
from models_jax.attention import Angles, Attend, attention
from models_jax.mlp import mlp


def forward(
    spec: ModelSpec,
    params: Mapping[str, Any],
    tokens: ops.Array,
    positions: ops.Array,
    attend: Attend,
    cache: Any,
    taps: Sequence[str] = (),
) -> tuple[ops.Array, Any, dict[str, ops.Array]]:
    """Run tokens int32[T] at positions int32[T] through all layers.

    Returns the normed hidden state [T, hidden], the cache, and the inner values that `taps` names, each [T, ...]:
    "embed", "layers.i.attention", "layers.i.mlp", "layers.i" (the stream after layer i), "final_norm".
    """
    x = ops.embed(tokens, params["embed"])
    found = {"embed": x}
    ropes = {layer.mixer.rope for layer in spec.layers} - {None}
    angles = {rope: ops.angles(rope.frequencies(), positions, x.dtype) for rope in ropes if rope is not None}

    def body(layer: Layer, p: Mapping[str, Any], x: ops.Array, cache: Any, place: stack.Place) -> stack.Step:
        return block(spec, layer, p, x, angles, attend, cache, place)

    x, cache, inner = stack.run(spec, params["layers"], x, cache, body, taps)
    x = ops.rms_norm(x, params["final_norm"], spec.norm_eps)
    found |= inner | {"final_norm": x}
    return x, cache, {name: found[name] for name in taps if name in found}


def block(
    spec: ModelSpec,
    layer: Layer,
    p: Mapping[str, Any],
    x: ops.Array,
    angles: Angles,
    attend: Attend,
    cache: Any,
    place: stack.Place,
) -> stack.Step:
    """One pre-norm layer on x [T, hidden]. Returns the new stream, the cache and the layer's inner values."""
    h = ops.rms_norm(x, p["attention_norm"], spec.norm_eps)
    mixed, cache = attention(layer.mixer, spec.norm_eps, p["attention"], h, angles, attend, cache, place)
    x = x + mixed
    h = ops.rms_norm(x, p["mlp_norm"], spec.norm_eps)
    fed = mlp(layer.feed, p["mlp"], h)
    x = x + fed
    return x, cache, {".attention": mixed, ".mlp": fed, "": x}


def logits(spec: ModelSpec, params: Mapping[str, Any], x: ops.Array) -> ops.Array:
    """Normed hidden states [R, hidden] -> float32 logits [R, vocab of this device]."""
    return ops.unembed(x, params["embed"] if spec.tied else params["head"])
