"""The decoder in plain numpy, as Hugging Face computes it. It shares no line with the models of the other backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.model.groups import Place, places
from engine.model.spec import Attention, Layer, Mlp, ModelSpec, Rope

Array: TypeAlias = NDArray[Any]
Attend: TypeAlias = Callable[[Place, Attention, Array, Array, Array], Array]
"""(place, a, q [T, q_heads, d], k, v [T, kv_heads, d]) -> [T, q_heads, d]: writes the cache and attends over it."""


def forward(
    spec: ModelSpec,
    params: Mapping[str, Array],
    tokens: Array,
    positions: Array,
    attend: Attend,
    taps: dict[str, Array],
) -> Array:
    """Normed hidden states [T, hidden] of tokens int[T] at positions int[T]. Fills `taps` with every inner value."""
    x = taps["embed"] = params["embed"][tokens]
    for i, (layer, place) in enumerate(zip(spec.layers, places(spec), strict=True)):
        p = Part(params, f"layers.{i}.")
        h = rms_norm(x, p["attention_norm"], spec.norm_eps)
        mixed = taps[f"layers.{i}.attention"] = attention(spec, layer, p, h, positions, place, attend)
        x = x + mixed
        h = rms_norm(x, p["mlp_norm"], spec.norm_eps)
        fed = taps[f"layers.{i}.mlp"] = mlp(layer.feed, p, h)
        x = taps[f"layers.{i}"] = x + fed
    x = taps["final_norm"] = rms_norm(x, params["final_norm"], spec.norm_eps)
    return x


class Part:
    """The parameters whose names start with a prefix."""

    def __init__(self, params: Mapping[str, Array], prefix: str) -> None:
        self.params, self.prefix = params, prefix

    def __getitem__(self, name: str) -> Array:
        return self.params[self.prefix + name]


def attention(
    spec: ModelSpec, layer: Layer, p: Part, x: Array, positions: Array, place: Place, attend: Attend
) -> Array:
    """x [T, hidden] -> [T, hidden]."""
    a = layer.mixer
    q, k, v = (np.tensordot(x, p[f"attention.{name}"], (1, 2)) for name in "qkv")
    if a.bias:
        q, k, v = q + p["attention.q_bias"], k + p["attention.k_bias"], v + p["attention.v_bias"]
    if a.qk_norm:
        q = rms_norm(q, p["attention.q_norm"], spec.norm_eps)
        k = rms_norm(k, p["attention.k_norm"], spec.norm_eps)
    if a.rope is not None:
        q, k = rotate(a.rope, q, positions), rotate(a.rope, k, positions)
    y = np.tensordot(attend(place, a, q, k, v), p["attention.out"], ((1, 2), (1, 2)))
    return y + p["attention.out_bias"] if a.out_bias else y


def mlp(m: Mlp, p: Part, x: Array) -> Array:
    """x [T, hidden] -> [T, hidden]."""
    gate, up = x @ p["mlp.gate"].T, x @ p["mlp.up"].T
    if m.bias:
        gate, up = gate + p["mlp.gate_bias"], up + p["mlp.up_bias"]
    y = (gate / (1 + np.exp(-gate)) * up) @ p["mlp.down"].T
    return y + p["mlp.down_bias"] if m.bias else y


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Over the last dimension."""
    return weight * (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps)))


def rotate(rope: Rope, x: Array, positions: Array) -> Array:
    """Rotate-half rope of x [T, heads, head_dim]; angles in float32, as in Hugging Face."""
    angle = positions.astype(np.float32)[:, None, None] * rope.frequencies()
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    half = rope.dim // 2
    a, b, rest = x[..., :half], x[..., half : rope.dim], x[..., rope.dim :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def attend(a: Attention, q: Array, k: Array, v: Array, start: int, first: int) -> Array:
    """Softmax attention of one row: q [n, q_heads, d] from position `start`, k and v [L, kv_heads, d] from `first`."""
    n, group = len(q), a.q_heads // a.kv_heads
    q = q.reshape(n, a.kv_heads, group, -1).transpose(1, 2, 0, 3)  # [kv_heads, group, n, d]
    k, v = (c.transpose(1, 0, 2)[:, None] for c in (k, v))  # [kv_heads, 1, L, d]
    score = q @ k.swapaxes(2, 3) * q.dtype.type(a.scale)
    at, seen = start + np.arange(n)[:, None], first + np.arange(k.shape[2])
    visible = (seen <= at) & (seen > at - (a.window or start + n))
    score = np.where(visible, score, -np.inf)
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    out = weight / weight.sum(axis=-1, keepdims=True) @ v
    return out.transpose(2, 0, 1, 3).reshape(n, a.q_heads, -1)
