"""The operations a model is written in, for torch. models_jax/ops.py has the same names and the same meaning."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from engine.mesh import RULES
from engine.model.spec import Norm
from models_torch.packed import Packed

Array: TypeAlias = torch.Tensor
Matrix: TypeAlias = torch.Tensor | Packed
"""A weight that is multiplied with."""


def linear(x: Array, w: Matrix, bias: Array | None) -> Array:
    """x [T, in], w [out, in] -> [T, out]."""
    if isinstance(w, Packed):
        y = w.multiply(x)
        return y if bias is None else y.add_(bias)
    return F.linear(x, w, bias)


def heads(x: Array, w: Matrix, bias: Array | None) -> Array:
    """x [T, hidden], w [heads, head_dim, hidden] -> [T, heads, head_dim]."""
    matrix = w if isinstance(w, Packed) else w.flatten(0, 1)
    return linear(x, matrix, None if bias is None else bias.flatten()).view(x.shape[0], w.shape[0], w.shape[1])


def merge(o: Array, w: Matrix) -> Array:
    """o [T, heads, head_dim], w [hidden, heads, head_dim] -> [T, hidden]; a partial sum where heads are split."""
    return linear(o.flatten(1), w if isinstance(w, Packed) else w.flatten(1), None)


@lru_cache(maxsize=64)
def _number(value: float, device: torch.device) -> Array:
    """float32[] on the device, kept: an operation with a Python number makes and converts a tensor each time."""
    return torch.full((), value, dtype=torch.float32, device=device)


def rms_norm(x: Array, w: Array, eps: float, kind: Norm = "plain") -> Array:
    """Over the last dimension, in float32.

    In fewer operations than torch's own, which on a CPU takes three times as long for one row.
    """
    h = x.float()
    size = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    scale = torch.addcmul(_number(eps, x.device), size, size, value=1 / x.shape[-1]).rsqrt_()
    if kind == "plain":
        return (h * scale).to(x.dtype).mul_(w)
    h = h * scale
    return (torch.addcmul(h, h, w.float()) if kind == "offset" else h.mul_(w)).to(x.dtype)


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return F.silu(x)


def gelu_tanh(x: Array) -> Array:
    """GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


def clamped(gate: Array, up: Array, alpha: float, limit: float) -> Array:
    """GPT-OSS: (up + 1) * gate * sigmoid(alpha * gate), of clamped gate and up."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(alpha * gate))


def soft_cap(x: Array, cap: float) -> Array:
    """cap * tanh(x / cap)."""
    return torch.tanh(x / cap) * cap


def scale(x: Array, by: float) -> Array:
    """x times a number rounded to x's dtype."""
    return x * _number(by, x.device).to(x.dtype)


@lru_cache(maxsize=64)
def _upload(frequencies: bytes, device: torch.device) -> Array:
    """float32[dim/2] on the device, kept: a copy at each step would be one more."""
    return torch.frombuffer(bytearray(frequencies), dtype=torch.float32).to(device)


def angles(
    frequencies: NDArray[np.float32], magnitude: float, positions: Array, dtype: torch.dtype
) -> tuple[Array, Array]:
    """What `rotate` takes, of positions int32[T] times frequencies float32[dim/2]: [T, 1, dim] twice, times magnitude.

    cos stands twice, sin once negative, so that a rotation is two products with whole heads.
    """
    a = positions.float()[:, None, None] * _upload(frequencies.tobytes(), positions.device)
    cos, sin = a.cos(), a.sin()
    if magnitude != 1:
        cos, sin = cos * magnitude, sin * magnitude
    cos, sin = cos.to(dtype), sin.to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding, rotate-half form, of the first cos.shape[-1] dimensions of x [T, heads, head_dim]."""
    dim = cos.shape[-1]
    part = x if dim == x.shape[-1] else x[..., :dim]
    turned = (part * cos).addcmul_(part.roll(dim // 2, -1), sin)
    return turned if dim == x.shape[-1] else torch.cat([turned, x[..., dim:]], -1)


def embed(tokens: Array, w: Matrix) -> Array:
    """tokens int32[T], w [vocab, hidden] -> [T, hidden]."""
    return w.look_up(tokens) if isinstance(w, Packed) else F.embedding(tokens, w)


def unembed(x: Array, w: Matrix) -> Array:
    """x [R, hidden], w [vocab, hidden] -> float32[R, vocab]."""
    return linear(x, w, None).float()


def psum(x: Array, axis: str) -> Array:
    """Sum over the devices that split the logical axis. One device until the torch mesh is built."""
    assert axis in RULES, axis
    return x
