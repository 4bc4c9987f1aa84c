"""Matrices of one input joined to one, on GPUs, where a step of few rows pays for each product that it starts."""

from __future__ import annotations

from typing import Any

import torch

from models_torch.ops import Joined

SETS = (("attention", "qkv", ("q", "k", "v")), ("mlp", "gate_up", ("gate", "up")))
"""Part of a layer, what is joined, of what."""


def join(tree: dict[str, Any]) -> None:
    """Join in place, layer by layer, so that no more than one layer's matrices stand twice; what is no plain matrix, or
    of another dtype than its neighbour, stays."""
    for layer in tree["layers"]:
        for where, name, of in SETS:
            part = layer.get(where, {})
            parts = [part.get(each) for each in of]
            if all(isinstance(each, torch.Tensor) for each in parts) and len({each.dtype for each in parts}) == 1:
                part[name] = _join(parts, [part.pop(f"{each}_bias", None) for each in of])
                for each in of:
                    del part[each]


def _join(parts: list[torch.Tensor], biases: list[torch.Tensor | None]) -> Joined:
    """[..., in] each, one below the other."""
    flat = [each.flatten(0, -2) for each in parts]
    bias = None if biases[0] is None else torch.cat([each.flatten() for each in biases if each is not None])
    return Joined(body=torch.cat(flat), sizes=tuple(len(each) for each in flat), bias=bias)


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
