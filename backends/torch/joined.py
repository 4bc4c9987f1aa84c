"""Matrices of one input joined to one, on GPUs, where a step of few rows pays for each product that it starts."""

from __future__ import annotations

from typing import Any

import torch

from models_torch import quantised
from models_torch.ops import Joined
from models_torch.quantised import Quantised

SETS = (("attention", "qkv", ("q", "k", "v")), ("mlp", "gate_up", ("gate", "up")))
"""Part of a layer, what is joined, of what."""


def join(tree: dict[str, Any]) -> None:
    """Join in place, layer by layer, so that no more than one layer's matrices stand twice; what is packed, of another
    dtype than its neighbour or would share a block of scales with it, stays."""
    for layer in tree["layers"]:
        for where, name, of in SETS:
            part = layer.get(where, {})
            body, sizes = _join([part.get(each) for each in of])
            if body is None:
                continue
            biases = [part.pop(f"{each}_bias", None) for each in of]
            bias = None if biases[0] is None else torch.cat([each.flatten() for each in biases])
            part[name] = Joined(body=body, sizes=sizes, bias=bias)
            for each in of:
                del part[each]


def _join(parts: list[Any]) -> tuple[torch.Tensor | Quantised | None, tuple[int, ...]]:
    """[..., in] each, one below the other, and their rows; None where they can't be."""
    if all(isinstance(each, Quantised) for each in parts):
        return quantised.join(parts), tuple(len(each.body) for each in parts)
    if all(isinstance(each, torch.Tensor) for each in parts) and len({each.dtype for each in parts}) == 1:
        flat = [each.flatten(0, -2) for each in parts]
        return torch.cat(flat), tuple(len(each) for each in flat)
    return None, ()


def renew(old: Any, new: Any) -> None:
    """Copy weights over others of the same shapes, in the memory that captured steps read."""
    if isinstance(old, dict):
        for name, value in old.items():
            renew(value, new[name])
    elif isinstance(old, list):
        for each, other in zip(old, new, strict=True):
            renew(each, other)
    elif isinstance(old, Joined):
        old.body.copy_(new.body)
        if old.bias is not None:
            old.bias.copy_(new.bias)
    else:
        old.copy_(new)
