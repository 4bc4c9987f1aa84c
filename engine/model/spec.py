"""A model as data. Nothing here computes on tensors; every backend reads the same description."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding, rotate-half form: the pair of dimension i is i + dim/2.

    dim: rotated dimensions of a head; theta: base. kind "linear" divides frequencies by factor; "llama3" divides the
    long wavelengths by factor and blends between original_max / high_freq and original_max / low_freq (Llama 3.1).
    """

    dim: int
    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq: float = 1.0
    high_freq: float = 4.0
    original_max: int = 8192

    def frequencies(self) -> NDArray[np.float32]:
        """Angle per position of each pair: float32[dim/2]. Computed in float32, as Hugging Face does."""
        exponent = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        freq: NDArray[np.float32] = (1 / np.power(np.float32(self.theta), exponent)).astype(np.float32)
        if self.kind == "linear":
            freq = (freq / np.float32(self.factor)).astype(np.float32)
        if self.kind == "llama3":
            length = (2 * math.pi / freq).astype(np.float32)
            smooth = (self.original_max / length - self.low_freq) / (self.high_freq - self.low_freq)
            blended = (1 - smooth) * freq / self.factor + smooth * freq
            long = length > self.original_max / self.low_freq
            short = length < self.original_max / self.high_freq
            freq = np.where(long, freq / self.factor, np.where(short, freq, blended)).astype(np.float32)
        return freq


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Softmax attention over a paged cache; query head h reads key-value head h * kv_heads // q_heads.

    bias: on q, k, v. out_bias: on the output projection. qk_norm: RMSNorm over each head of q and k, before rope.
    window: how many positions back a query sees, itself included; None = all. scale: multiplies the scores.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    scale: float
    bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """Gated feed-forward: down(act(gate(x)) * up(x))."""

    size: int
    act: Literal["silu"] = "silu"
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One pre-norm block: x += mixer(norm(x)); x += feed(norm(x))."""

    mixer: Attention
    feed: Mlp


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only language model.

    family: name of the file in archs that made it. norm_eps: of every RMSNorm. tied: the head is the embedding.
    max_len: positions the model was made for. dtype: of the checkpoint. eos: ids that end a text.
    """

    family: str
    vocab: int
    hidden: int
    layers: tuple[Layer, ...]
    norm_eps: float
    tied: bool
    max_len: int
    dtype: str
    eos: tuple[int, ...] = ()

    def period(self) -> int:
        """The smallest p such that layer i equals layer i - p: length of the pattern that can be scanned."""
        n = len(self.layers)
        return next(
            p for p in range(1, n + 1) if n % p == 0 and all(self.layers[i] == self.layers[i - p] for i in range(p, n))
        )
