"""Matrices of int8 or float8_e4m3fn, and products with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch.nn import functional as F

SIDE = 128
"""Rows and columns of a block."""
How: TypeAlias = Literal["plain", "bits", "native", "narrow", "library"]
"""How products are made. plain: by torch, of float32. On a GPU in bfloat16 by kernels: bits: the bits of float8_e4m3fn
are moved to where float16 has them; native: the chip widens it; narrow: the chip multiplies it too, so many rows become
it; library: the same by torch's own product."""
FEW, SOME = 64, 256
"""Rows up to which a matrix is widened in registers whatever `how` is; and up to which it is where rows stay wide: more
are multiplied by the library, with a widened copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """A matrix whose numbers are body times their scales (engine.model.quant).

    shape: the parameter's. body [*lead, out, in]: lead is its experts; scale float32[*lead, 1, out] of each row, or
    float32[*lead, out / 128, in / 128], rounded up, of each block.
    """

    shape: tuple[int, ...]
    body: torch.Tensor
    scale: torch.Tensor
    by: Literal["row", "block"]
    how: How = "plain"

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers and their scales."""
        return self.body.nbytes + self.scale.nbytes

    def copy_(self, other: Quantised) -> None:
        """Take another's numbers, in the memory that is there."""
        self.body.copy_(other.body)
        self.scale.copy_(other.scale)

    def __getitem__(self, expert: int) -> Quantised:
        """The matrix of one expert."""
        return replace(self, shape=self.shape[1:], body=self.body[expert], scale=self.scale[expert])

    def dequantised(self) -> torch.Tensor:
        """float32[*lead, out, in]."""
        return self.body.float() * self._each()

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out], summed in float32, in memory of its own."""
        if self.how != "plain":
            return self._by_kernel(x)
        return self._plainly(x)

    def _by_kernel(self, x: torch.Tensor) -> torch.Tensor:
        from kernels_cuda import quantised_matmul as wide
        from kernels_cuda import scaled_matmul as narrow

        rows, native = x.shape[0], self.how != "bits"
        if wide.supports(x, self.body):
            return self._plainly(x)
        if rows <= FEW:
            return wide.quantised_matmul(x, self.body, self.scale, self.by, native=native)
        library = self.how == "library"
        if self.how in ("narrow", "library") and not narrow.supports(x, self.body, self.by, library):
            return narrow.scaled_matmul(x, self.body, self.scale, self.by, library)
        if rows <= SOME:
            return wide.quantised_matmul(x, self.body, self.scale, self.by, native=native)
        return F.linear(x, wide.widened(self.body, self.scale, self.by, native))

    def _plainly(self, x: torch.Tensor) -> torch.Tensor:
        if self.by == "row":  # scaled afterwards
            return F.linear(x.float(), self.body.float()).mul_(self.scale).to(x.dtype)
        return F.linear(x.float(), self.dequantised()).to(x.dtype)

    def _each(self) -> torch.Tensor:
        """The scales as they stand against the body."""
        if self.by == "row":
            return self.scale.mT
        rows, columns = self.body.shape[-2:]
        return self.scale.repeat_interleave(SIDE, -2)[..., :rows, :].repeat_interleave(SIDE, -1)[..., :columns]


def join(parts: Sequence[Quantised]) -> Quantised | None:
    """Matrices of one input, one below the other; None where they are of several kinds or would share a block."""
    first = parts[0]
    alike = all((p.by, p.how, p.body.dtype) == (first.by, first.how, first.body.dtype) for p in parts)
    apart = first.by == "row" or all(p.body.shape[0] % SIDE == 0 for p in parts[:-1])
    if not alike or not apart or first.body.ndim != 2:
        return None
    body = torch.cat([p.body.view(torch.uint8) for p in parts]).view(first.body.dtype)
    scale = torch.cat([p.scale for p in parts], 1 if first.by == "row" else 0)
    return replace(first, shape=tuple(body.shape), body=body, scale=scale)
