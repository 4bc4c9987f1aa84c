"""The gated feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.spec import Mlp
from models_torch import ops


def mlp(m: Mlp, p: Mapping[str, Any], x: ops.Array) -> ops.Array:
    """x [T, hidden] -> [T, hidden]."""
    act = ops.silu if m.act == "silu" else ops.gelu_tanh
    h = act(ops.linear(x, p["gate"], p.get("gate_bias"))) * ops.linear(x, p["up"], p.get("up_bias"))
    y = ops.psum(ops.linear(h, p["down"], None), "ffn")
    return y + p["down_bias"] if m.bias else y
