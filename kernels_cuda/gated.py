"""act(gate) * up in one pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels_cuda.overlap import options, ready, wait

ACTS = ("silu", "gelu_tanh")
BLOCK = 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(gate: Any, up: Any, act: str) -> str:
    """Why the kernel is not for gate and up [T, size]; "" where it is."""
    if act not in ACTS:
        return f"the activation {act}"
    if gate.dtype not in DTYPES or up.dtype != gate.dtype:
        return f"{gate.dtype} and {up.dtype}"
    if gate.ndim != 2 or gate.stride(1) != 1 or up.stride(1) != 1:
        return "rows whose entries do not lie side by side"
    return ""


def plain(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    """What `gated` computes, in torch."""
    from torch.nn import functional as F

    return (F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")) * up


def gated(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    """gate, up [T, size], rows at any distance -> [T, size]; act(gate) is rounded before the product, as in torch."""
    tokens, size = gate.shape
    out = torch.empty((tokens, size), dtype=gate.dtype, device=gate.device)
    if tokens:
        _gated[(tokens, triton.cdiv(size, BLOCK))](
            gate,
            up,
            out,
            gate.stride(0),
            up.stride(0),
            size=size,
            GELU=act == "gelu_tanh",
            BLOCK=BLOCK,
            num_warps=4,
            **options(gate),
        )
    return out


@triton.jit
def _gated(
    gate, up, out, gate_stride, up_stride,
    size: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    ready(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    raw = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0)
    g = raw.to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    a = activate(g, GELU)
    tl.store(out + row * size + column, (a.to(raw.dtype).to(tl.float32) * u).to(raw.dtype), mask=inside)


@triton.jit
def activate(g, GELU: tl.constexpr):
    """The activation of float32 numbers: GELU in its tanh form, or SiLU."""
    if GELU:
        z = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        a = g * (1.0 - 1.0 / (tl.exp(2.0 * z) + 1.0))  # g / 2 * (1 + tanh z)
    else:
        a = g / (1.0 + tl.exp(-g))
    return a
