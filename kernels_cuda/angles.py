"""What a rotary embedding multiplies by, of positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels_cuda.overlap import options, ready, wait


def angles(
    frequencies: torch.Tensor, magnitude: float, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions int[T] times frequencies float32[half], times magnitude: [T, 1, 2 * half] each, cos
    twice, sin once negative."""
    tokens, half = len(positions), len(frequencies)
    cos, sin = torch.empty((2, tokens, 1, 2 * half), dtype=dtype, device=positions.device).unbind(0)
    if tokens:
        _angles[(tokens,)](
            frequencies, positions, cos, sin, magnitude,
            half=half, HALF=triton.next_power_of_2(half), num_warps=1, **options(positions),
        )  # fmt: skip
    return cos, sin


@triton.jit
def _angles(
    frequencies, positions, cos, sin, magnitude, half: tl.constexpr, HALF: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    ready(OVERLAP)
    wait(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, HALF)
    inside = d < half
    angle = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + d, mask=inside, other=0.0)
    c, s = (tl.cos(angle) * magnitude).to(cos.dtype.element_ty), tl.sin(angle) * magnitude
    to = token * (2 * half) + d
    tl.store(cos + to, c, mask=inside)
    tl.store(cos + to + half, c, mask=inside)
    tl.store(sin + to, (-s).to(sin.dtype.element_ty), mask=inside)
    tl.store(sin + to + half, s.to(sin.dtype.element_ty), mask=inside)
