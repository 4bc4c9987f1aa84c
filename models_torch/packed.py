"""Matrices of a 16-bit checkpoint on a CPU: half the memory, float32 arithmetic.

docs/decisions/0005-float32-on-cpu.md has the figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A matrix [out, in] that FBGEMM multiplies with: float16 in memory, widened on the way to the registers, so that
    products and sums are float32 while decoding reads half the bytes.

    What stands in memory is the value divided by `scale`, a power of two that brings the largest to 2^14 .. 2^15. So a
    bfloat16 or float16 value is held exactly; one below 2^-32 of the largest, to within 2^-40 of the largest: 16 bits
    under what float32 sums round away.

    shape: the parameter's. scale: float32[]. rows: the matrix as in the checkpoint, where it is an embedding.
    """

    shape: tuple[int, ...]
    body: Any
    scale: torch.Tensor
    rows: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers; what FBGEMM adds to fill its blocks is not counted."""
        return 2 * math.prod(self.shape) + (0 if self.rows is None else self.rows.nbytes)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x float32[T, in] -> float32[T, out], in memory of its own."""
        y: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.body)
        return y.mul_(self.scale)

    def look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int[T] -> float32[T, in]."""
        assert self.rows is not None
        return F.embedding(tokens, self.rows).float()


@cache
def packable() -> bool:
    """Whether this build of torch multiplies so on this processor."""
    capable = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return capable and "fbgemm" in torch.backends.quantized.supported_engines


def pack(w: torch.Tensor, inner: int, embedding: bool = False) -> Packed | None:
    """Pack a parameter on the CPU, float16 or bfloat16; None where it must stay plain.

    inner: how many trailing dimensions are summed over. embedding: rows are looked up too.
    """
    matrix = w.reshape(math.prod(w.shape[: w.ndim - inner]), -1).float()
    largest = float(matrix.abs().max())
    if not packable() or not math.isfinite(largest):  # FBGEMM would make a number of a NaN
        return None
    scale = 2.0 ** min(max(math.frexp(largest)[1] - 15, -100), 100)
    body = torch.ops.quantized.linear_prepack_fp16(matrix / scale, None)
    return Packed(shape=tuple(w.shape), body=body, scale=torch.tensor(scale), rows=w if embedding else None)
