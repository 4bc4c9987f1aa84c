"""The decoder in plain numpy, as Hugging Face computes it. It shares no line with the models of the other backends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.model.groups import Place, places
from engine.model.spec import Attention, Experts, Layer, Mlp, ModelSpec, Rope

Array: TypeAlias = NDArray[Any]
Attend: TypeAlias = Callable[[Place, Attention, Array, Array, Array, Array | None, tuple[Array, Array] | None], Array]
"""(place, a, q [T, q_heads, d], k, v [T, kv_heads, d], sinks [q_heads], scales and their inverses [2, kv_heads]) ->
[T, q_heads, d]: writes the cache and attends over it."""


def forward(
    spec: ModelSpec,
    params: Mapping[str, Array],
    tokens: Array,
    positions: Array,
    attend: Attend,
    taps: dict[str, Array],
) -> Array:
    """Normed hidden states [T, hidden] of tokens int[T] at positions int[T]. Fills `taps` with every inner value."""
    x = taps["embed"] = params["embed"][tokens] * params["embed"].dtype.type(spec.embed_scale)
    for i, (layer, place) in enumerate(zip(spec.layers, places(spec), strict=True)):
        p = Part(params, f"layers.{i}.")
        h = rms_norm(spec, x, p["attention_norm"])
        mixed = taps[f"layers.{i}.attention"] = attention(spec, layer, p, h, positions, place, attend)
        x = x + (rms_norm(spec, mixed, p["attention_out_norm"]) if layer.sandwich else mixed)
        h = rms_norm(spec, x, p["mlp_norm"])
        feed = layer.feed
        if isinstance(feed, Experts):
            fed, taps[f"layers.{i}.routing"] = moe(feed, p, h)
        else:
            fed = mlp(feed, p, h)
        taps[f"layers.{i}.mlp"] = fed
        x = taps[f"layers.{i}"] = x + (rms_norm(spec, fed, p["mlp_out_norm"]) if layer.sandwich else fed)
    x = taps["final_norm"] = rms_norm(spec, x, params["final_norm"])
    return x


def logits(spec: ModelSpec, params: Mapping[str, Array], x: Array) -> Array:
    """Normed hidden states [T, hidden] -> [T, vocab]."""
    y = x @ params["embed" if spec.tied else "head"].T
    return y if spec.logit_cap is None else soft_cap(y, spec.logit_cap)


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
        q, k = rms_norm(spec, q, p["attention.q_norm"]), rms_norm(spec, k, p["attention.k_norm"])
    if a.rope is not None:
        q, k = rotate(a.rope, q, positions), rotate(a.rope, k, positions)
    sinks = p["attention.sinks"] if a.sinks else None
    scales = (p["attention.scales"], p["attention.inverses"]) if a.scaled else None
    mixed = attend(place, a, q, k, v, sinks, scales)
    y = np.tensordot(mixed, p["attention.out"], ((1, 2), (1, 2)))
    return y + p["attention.out_bias"] if a.out_bias else y


def mlp(m: Mlp, p: Part, x: Array) -> Array:
    """x [T, hidden] -> [T, hidden]."""
    gate, up = x @ p["mlp.gate"].T, x @ p["mlp.up"].T
    if m.bias:
        gate, up = gate + p["mlp.gate_bias"], up + p["mlp.up_bias"]
    acted = gate / (1 + np.exp(-gate)) if m.act == "silu" else gelu_tanh(gate)
    y = (acted * up) @ p["mlp.down"].T
    return y + p["mlp.down_bias"] if m.bias else y


def moe(e: Experts, p: Part, x: Array) -> tuple[Array, Array]:
    """x [T, hidden] -> ([T, hidden], int[T, top_k]: who was chosen), token by token and expert by expert."""
    scores = x @ p["moe.router"].T + (p["moe.router_bias"] if e.bias else 0)
    out, chosen = np.zeros_like(x), np.argsort(-scores, axis=-1, kind="stable")[:, : e.top_k]
    for t, row in enumerate(scores):
        share = np.exp(row - row.max())
        share /= share[chosen[t]].sum() if e.renormalised else share.sum()
        for i in chosen[t]:
            gate, up = p["moe.gate"][i] @ x[t], p["moe.up"][i] @ x[t]
            if e.bias:
                gate, up = gate + p["moe.gate_bias"][i], up + p["moe.up_bias"][i]
            if e.act == "clamped":
                gate, up = np.minimum(gate, e.limit), np.clip(up, -e.limit, e.limit) + 1
            slope = e.alpha if e.act == "clamped" else 1.0
            y = p["moe.down"][i] @ (gate / (1 + np.exp(-slope * gate)) * up)
            out[t] += share[i] * (y + p["moe.down_bias"][i] if e.bias else y)
    return out, chosen


def gelu_tanh(x: Array) -> Array:
    """GELU in its tanh form."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def soft_cap(x: Array, cap: float) -> Array:
    """cap * tanh(x / cap)."""
    return cap * np.tanh(x / cap)


def rms_norm(spec: ModelSpec, x: Array, weight: Array) -> Array:
    """Over the last dimension."""
    normed = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(spec.norm_eps))
    return normed * (1 + weight if spec.norm == "offset" else weight)


def rotate(rope: Rope, x: Array, positions: Array) -> Array:
    """Rotate-half rope of x [T, heads, head_dim]; angles in float32, as in Hugging Face."""
    angle = positions.astype(np.float32)[:, None, None] * rope.frequencies()
    cos, sin = ((rope.magnitude * f(angle)).astype(x.dtype) for f in (np.cos, np.sin))
    half = rope.dim // 2
    a, b, rest = x[..., :half], x[..., half : rope.dim], x[..., rope.dim :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def attend(a: Attention, q: Array, k: Array, v: Array, start: int, first: int, sinks: Array | None = None) -> Array:
    """Softmax attention of one row: q [n, q_heads, d] from position `start`, k and v [L, kv_heads, d] from `first`."""
    n, group = len(q), a.q_heads // a.kv_heads
    q = q.reshape(n, a.kv_heads, group, -1).transpose(1, 2, 0, 3)  # [kv_heads, group, n, d]
    k, v = (c.transpose(1, 0, 2)[:, None] for c in (k, v))  # [kv_heads, 1, L, d]
    score = q @ k.swapaxes(2, 3) * q.dtype.type(a.scale)
    if a.cap is not None:
        score = soft_cap(score, a.cap)
    at, seen = start + np.arange(n)[:, None], first + np.arange(k.shape[2])
    visible = (seen <= at) & (seen > at - (a.window or start + n))
    score = np.where(visible, score, -np.inf)
    if sinks is not None:  # one more score, whose value is nothing
        sink = np.broadcast_to(sinks.reshape(a.kv_heads, group, 1, 1), (*score.shape[:3], 1))
        score = np.concatenate([score, sink], axis=-1)
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    weight = weight / weight.sum(axis=-1, keepdims=True)
    out = weight[..., : k.shape[2]] @ v
    return out.transpose(2, 0, 1, 3).reshape(n, a.q_heads, -1)
