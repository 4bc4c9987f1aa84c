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
    h = experts.gated(e, p, x, order)
    y = ops.psum(experts.collect(h, p["down"], share, order), "ffn")
    return (y + experts.mix(p["down_bias"], share, chosen) if e.bias else y), chosen
