"""Matrices of int8 or float8_e4m3fn, and products with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional as F

SIDE = 128
"""Rows and columns of a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """A matrix whose numbers are body times their scales (engine.model.quant).

    shape: the parameter's. body [*lead, out, in]: lead is its experts; scale float32[*lead, 1, out] of each row, or
    float32[*lead, out / 128, in / 128], rounded up, of each block. exact: always multiplied plainly, as deterministic
    mode asks.
    """

    shape: tuple[int, ...]
    body: torch.Tensor
    scale: torch.Tensor
    by: Literal["row", "block"]
    exact: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers and their scales."""
        return self.body.nbytes + self.scale.nbytes

    def __getitem__(self, expert: int) -> Quantised:
        """The matrix of one expert."""
        return replace(self, shape=self.shape[1:], body=self.body[expert], scale=self.scale[expert])

    def dequantised(self) -> torch.Tensor:
        """float32[*lead, out, in]."""
        return self.body.float() * self._each()

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out], summed in float32, in memory of its own."""
        if self.by == "row":  # scaled afterwards
            return F.linear(x.float(), self.body.float()).mul_(self.scale).to(x.dtype)
        return F.linear(x.float(), self.dequantised()).to(x.dtype)

    def _each(self) -> torch.Tensor:
        """The scales as they stand against the body."""
        if self.by == "row":
            return self.scale.mT
        rows, columns = self.body.shape[-2:]
        return self.scale.repeat_interleave(SIDE, -2)[..., :rows, :].repeat_interleave(SIDE, -1)[..., :columns]
