"""A decoder-only model in local view: a function states what one device does and names the axis of a reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.model.groups import places
from engine.model.spec import Experts, Layer, ModelSpec
from models_torch import ops, stack
from models_torch.attention import Angles, Attend, attention
from models_torch.mlp import mlp
from models_torch.moe import moe


def forward(
    spec: ModelSpec,
    params: Mapping[str, Any],
    tokens: ops.Array,
    positions: ops.Array,
    attend: Attend,
    cache: Any,
    taps: Sequence[str] = (),
    ends: ops.Array | None = None,
) -> tuple[ops.Array, Any, dict[str, ops.Array]]:
    """Run tokens int32[T] at positions int32[T] through all layers.

    ends int[O]: the tokens whose hidden states are wanted, all that the last layer is computed to its end for, where
    layers are a list; None: every token. Taps are of every token, so there are none with it.

    Returns the normed hidden state [T or O, hidden], the cache, and the inner values that `taps` names, each [T, ...]:
    "embed", "layers.i.attention", "layers.i.mlp" (experts too), both as they are before a norm of their own,
    "layers.i.routing" (int[T, top_k], where a layer has experts), "layers.i" (the stream after layer i), "final_norm".
    """
    x = ops.embed(tokens, params["embed"])
    if spec.embed_scale != 1:
        x = ops.scale(x, spec.embed_scale)
    found = {"embed": x}
    ropes = {layer.mixer.rope for layer in spec.layers} - {None}
    last = places(spec)[-1]
    angles = {r: ops.angles(r.frequencies(), r.magnitude, positions, x.dtype) for r in ropes if r is not None}

    def body(layer: Layer, p: Mapping[str, Any], x: ops.Stream, cache: Any, place: stack.Place) -> stack.Step:
        return block(
            spec, layer, p, x, angles, attend, cache, place, ends if ends is not None and place == last else None
        )

    x, cache, inner = stack.run(spec, params["layers"], x, cache, body, taps)
    x = ops.rms_norm(x, params["final_norm"], spec.norm_eps, spec.norm)
    found |= inner | {"final_norm": x}
    return x, cache, {name: found[name] for name in taps if name in found}


def block(
    spec: ModelSpec,
    layer: Layer,
    p: Mapping[str, Any],
    x: ops.Stream,
    angles: Angles,
    attend: Attend,
    cache: Any,
    place: stack.Place,
    ends: ops.Array | None = None,
) -> stack.Step:
    """One pre-norm layer on x [T, hidden]. Returns the new stream, of the tokens `ends` alone where they are given, the
    cache and the layer's inner values."""

    def norm(x: ops.Stream, w: ops.Array) -> ops.Array:
        return ops.rms_norm(x, w, spec.norm_eps, spec.norm)

    h = norm(x, p["attention_norm"])
    mixed, cache = attention(layer.mixer, norm, p["attention"], h, angles, attend, cache, place)
    if ends is not None:
        x, mixed = ops.pick(x, ends), ops.pick(mixed, ends)
    x = ops.add(x, norm(mixed, p["attention_out_norm"]) if layer.sandwich else mixed)
    h = norm(x, p["mlp_norm"])
    inner = {".attention": mixed}
    if isinstance(layer.feed, Experts):
        fed, inner[".routing"] = moe(layer.feed, p["moe"], h)
    else:
        fed = mlp(layer.feed, p["mlp"], h)
    x = ops.add(x, norm(fed, p["mlp_out_norm"]) if layer.sandwich else fed)
    return x, cache, inner | {".mlp": fed, "": x}


def logits(spec: ModelSpec, params: Mapping[str, Any], x: ops.Array) -> ops.Array:
    """Normed hidden states [R, hidden] -> float32 logits [R, vocab of this device]."""
    y = ops.unembed(x, params["embed"] if spec.tied else params["head"])
    return y if spec.logit_cap is None else ops.soft_cap(y, spec.logit_cap)
