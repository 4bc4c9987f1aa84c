"""Matrices laid out for the CPU library that multiplies them fastest, in float32 throughout (docs/decisions/0005)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

ROWS = 8
"""Rows of a product that oneDNN's layout is chosen for: a small batch of decode rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A float32 matrix [out, in] to multiply with.

    form "half" (FBGEMM): values stand in memory as float16 divided by `scale`, a power of two, and are widened on their
    way to the registers; products and sums are float32. It halves the memory that decoding reads. The scale brings
    the largest value near 2^15, so that a bfloat16 or float16 value is held exactly, or, where it is smaller than 2^-32 of
    the largest, within 2^-40 of the largest: 16 bits below what float32 sums round away.
    form "blocked" (oneDNN): float32 in the order in which oneDNN reads it.

    shape: the parameter's. rows: the matrix once more, in the checkpoint's dtype, where it is an embedding too.
    """

    shape: tuple[int, ...]
    form: str
    body: Any
    scale: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers; what a library adds to fill its blocks is not counted."""
        held = 0 if self.rows is None else self.rows.nbytes
        return math.prod(self.shape) * (2 if self.form == "half" else 4) + held

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x float32[T, in] -> float32[T, out], in memory of its own."""
        if self.form == "blocked":
            return torch.ops.mkldnn._linear_pointwise(x, self.body, None, "none", [], "")
        return torch.ops.quantized.linear_dynamic_fp16(x, self.body).mul_(self.scale)

    def look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int[T] -> float32[T, in]."""
        assert self.rows is not None
        return F.embedding(tokens, self.rows).float()


def pack(w: torch.Tensor, inner: int, embedding: bool = False) -> Packed | None:
    """Pack a parameter on the CPU; None where this build of torch has no library for it.

    w: in the checkpoint's dtype. inner: how many trailing dimensions are summed over. embedding: it is looked up too.
    """
    matrix = w.reshape(math.prod(w.shape[: w.ndim - inner]), -1).float()
    largest = float(matrix.abs().max())
    forms = available()
    # FBGEMM would make a number of a NaN
    form = "half" if w.dtype != torch.float32 and "half" in forms and math.isfinite(largest) else "blocked"
    if form not in forms:
        return None
    rows = w if embedding else None
    if form == "blocked":
        body = torch.ops.mkldnn._reorder_linear_weight(matrix, ROWS)
        return Packed(shape=tuple(w.shape), form=form, body=body, rows=rows)
    scale = _scale(largest)
    body = torch.ops.quantized.linear_prepack_fp16(matrix * scale, None)
    return Packed(shape=tuple(w.shape), form=form, body=body, scale=torch.tensor(1 / scale), rows=rows)


def _scale(largest: float) -> float:
    """The power of two that brings the largest value to 2^14 .. 2^15; float16 ends below 2^16."""
    return 2.0 ** min(max(15 - math.frexp(largest)[1], -100), 100)


@cache
def available() -> frozenset[str]:
    """The forms that this build of torch, on this processor, has a library for."""
    found = {"blocked"} if torch.backends.mkldnn.is_available() else set()
    capable = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if capable and {"fbgemm", "x86"} & set(torch.backends.quantized.supported_engines):
        found.add("half")
    return frozenset(found)
