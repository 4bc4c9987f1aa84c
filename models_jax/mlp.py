"""The gated feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.spec import Mlp
from models_jax import ops


def mlp(m: Mlp, p: Mapping[str, Any], x: ops.Array) -> ops.Array:
    """x [T, hidden] -> [T, hidden]."""
    y = ops.psum(ops.linear(ops.gated(x, p, m.act), p["down"], None), "ffn")
    return y + p["down_bias"] if m.bias else y
