"""The attention mixer: projections here; rope, the cache and the softmax behind `attend`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from engine.model.spec import Attention, Rope
from models_torch import ops, stack

Angles: TypeAlias = Mapping[Rope, tuple[ops.Array, ops.Array]]


class Attend(Protocol):
    """Rotates q and k (`ops.rotate`), writes k and v of this step to the cache and attends over it.

    q [T, q_heads, head_dim], k and v [T, kv_heads, head_dim], local heads -> ([T, q_heads, head_dim], cache).
    sinks [q_heads]: where the layer has them. scales: where the cache has 8 bits, what keys and values that are read of
    it are multiplied by, float32[2, kv_heads], and the inverses of that, for what is written. turn: what rotates, as
    `ops.angles` gives it; None: nothing does.
    """

    def __call__(
        self,
        a: Attention,
        q: ops.Array,
        k: ops.Array,
        v: ops.Array,
        cache: Any,
        place: stack.Place,
        sinks: ops.Array | None = None,
        scales: tuple[ops.Array, ops.Array] | None = None,
        turn: tuple[ops.Array, ops.Array] | None = None,
    ) -> tuple[ops.Array, Any]: ...


def attention(
    a: Attention,
    norm: Callable[[ops.Array, ops.Array], ops.Array],
    p: Mapping[str, Any],
    x: ops.Array,
    angles: Angles,
    attend: Attend,
    cache: Any,
    place: stack.Place,
) -> tuple[ops.Array, Any]:
    """x [T, hidden] -> ([T, hidden], cache). norm: the model's RMSNorm, of x by a weight."""
    q, k, v = ops.qkv(x, p, a.head_dim)
    if a.qk_norm:
        q = norm(q, p["q_norm"])
        k = norm(k, p["k_norm"])
    scales = (p["scales"], p["inverses"]) if a.scaled else None
    turn = None if a.rope is None else angles[a.rope]
    o, cache = attend(a, q, k, v, cache, place, p.get("sinks"), scales=scales, turn=turn)
    y = ops.psum(ops.merge(o, p["out"]), "q_heads")
    return (y + p["out_bias"] if a.out_bias else y), cache
