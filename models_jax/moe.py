"""Experts: each token goes through those that the router scores highest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.spec import Experts
from models_jax import experts, ops


def moe(e: Experts, p: Mapping[str, Any], x: ops.Array) -> tuple[ops.Array, ops.Array]:
    """x [T, hidden] -> ([T, hidden], the experts of each token int[T, top_k], the largest share first).

    Tokens are sorted by expert, so that each expert multiplies the rows that chose it and no others.
    """
    share, chosen = experts.route(ops.linear(x, p["router"], p.get("router_bias")), e.top_k, e.renormalised)
    order = experts.sort(chosen, e.count)
    rows = experts.spread(x, order)
    gate = experts.multiply(rows, p["gate"], p.get("gate_bias"), order)
    up = experts.multiply(rows, p["up"], p.get("up_bias"), order)
    h = ops.silu(gate) * up if e.act == "silu" else ops.clamped(gate, up, e.alpha, e.limit)
    y = ops.psum(experts.collect(experts.multiply(h, p["down"], None, order), share, order), "ffn")
    return (y + experts.mix(p["down_bias"], share, chosen) if e.bias else y), chosen
