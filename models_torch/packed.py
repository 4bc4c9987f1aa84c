"""Matrices in the form that a CPU's library multiplies fastest (docs/decisions/0005-dtypes-on-cpu.md has figures)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

ROWS = 8
"""Rows of a product that oneDNN's form is chosen for: a small batch of decode rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A matrix [out, in] to multiply with, in float32 or bfloat16, which is the dtype of activations and results.

    float32, for 16-bit checkpoints (FBGEMM): what stands in memory is float16, widened on the way to the registers, so
    that products and sums are float32 while decoding reads half the bytes. It is the value divided by `scale`, a power
    of two that brings the largest to 2^14 .. 2^15. So a bfloat16 or float16 value is held exactly; one below 2^-32 of
    the largest, to within 2^-40 of the largest: 16 bits under what float32 sums round away.
    bfloat16 (oneDNN): the values in the order in which the processor's bfloat16 instructions take them. scale is None.

    shape: the parameter's. rows: the matrix as in the checkpoint, where it is an embedding.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    body: Any
    scale: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers; what a library adds to fill its blocks is not counted."""
        return 2 * math.prod(self.shape) + (0 if self.rows is None else self.rows.nbytes)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out], in memory of its own."""
        y: torch.Tensor
        if self.scale is None:
            y = torch.ops.mkldnn._linear_pointwise(x, self.body, None, "none", [], "")
            return y
        y = torch.ops.quantized.linear_dynamic_fp16(x, self.body)
        return y.mul_(self.scale)

    def look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int[T] -> [T, in]."""
        assert self.rows is not None
        return F.embedding(tokens, self.rows).to(self.dtype)


@cache
def packable(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this processor, has a form to compute in `dtype` with."""
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    capable = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return dtype == torch.float32 and capable and "fbgemm" in torch.backends.quantized.supported_engines


def pack(w: torch.Tensor, inner: int, dtype: torch.dtype, embedding: bool = False) -> Packed | None:
    """Pack a parameter, on the CPU and in the checkpoint's dtype, to compute in `dtype`; None where it stays plain.

    inner: how many trailing dimensions are summed over. embedding: rows are looked up too.
    """
    if w.dtype == torch.float32 or not packable(dtype):
        return None
    matrix = w.reshape(math.prod(w.shape[: w.ndim - inner]), -1)
    shape, rows = tuple(w.shape), w if embedding else None
    if dtype == torch.bfloat16:
        body = torch.ops.mkldnn._reorder_linear_weight(matrix.to(dtype), ROWS)
        return Packed(shape=shape, dtype=dtype, body=body, rows=rows)
    matrix = matrix.float()
    largest = float(matrix.abs().max())
    if not math.isfinite(largest):  # FBGEMM would make a number of a NaN
        return None
    scale = 2.0 ** min(max(math.frexp(largest)[1] - 15, -100), 100)
    body = torch.ops.quantized.linear_prepack_fp16(matrix / scale, None)
    return Packed(shape=shape, dtype=dtype, body=body, scale=torch.tensor(scale), rows=rows)
