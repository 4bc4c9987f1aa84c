"""Matrices quantised where they lie, and random ones made there: the numbers of engine.model.quant and of
engine.model.weights, to the bit, at the speed of a device."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from engine.model.params import Param
from engine.model.quant import BY, MOST, SIDE
from engine.model.weights import PERIOD, STRIDE, RandomWeights

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8-row": torch.float8_e4m3fn}
ROOM = 1 << 24
"""Numbers that are quantised at once: what is widened for it is bounded."""


def quantise(w: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """w [*lead, out, in] of any float -> `engine.model.quant.quantise` of it. Where numbers are not finite, scales are
    not."""
    if w.ndim > 2:
        made = [quantise(one, kind) for one in w]
        return torch.stack([q for q, _ in made]), torch.stack([s for _, s in made])
    columns, inner = w.shape
    body = torch.empty((columns, inner), dtype=DTYPES[kind], device=w.device)
    step = max(SIDE, ROOM // inner // SIDE * SIDE)
    scales = [_some(w[at : at + step], kind, body[at : at + step]) for at in range(0, columns, step)]
    return body, torch.cat(scales, 1 if BY[kind] == "row" else 0)


def _some(w: torch.Tensor, kind: str, to: torch.Tensor) -> torch.Tensor:
    """Rows of a matrix, from a multiple of SIDE on. Gives their scales, as they are kept."""
    wide = w.float()
    most = torch.full((), MOST[kind], device=w.device)  # a tensor: by a number a GPU would multiply with 1 / it
    rows, columns = wide.shape
    if BY[kind] == "row":
        largest = wide.abs().amax(1, keepdim=True)
    else:
        high, across = -(-rows // SIDE), -(-columns // SIDE)
        padded = F.pad(wide.abs(), (0, across * SIDE - columns, 0, high * SIDE - rows))
        largest = padded.view(high, SIDE, across, SIDE).amax((1, 3))
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / most)
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    each = scale
    if BY[kind] == "block":
        each = scale.repeat_interleave(SIDE, 0)[:rows].repeat_interleave(SIDE, 1)[:, :columns]
    ratio = (wide / each).clamp_(-MOST[kind], MOST[kind])
    to.copy_(ratio.round_() if kind == "int8" else ratio)
    return scale.T if BY[kind] == "row" else scale


def draw(source: RandomWeights, p: Param, tape: torch.Tensor) -> torch.Tensor:
    """A whole parameter of random weights, made on the device: what `source.read` gives. tape: `source.tape(p)`,
    there."""
    if p.name.endswith("norm"):
        return torch.full(p.shape, source.norm, dtype=tape.dtype, device=tape.device)
    row = torch.arange(math.prod(p.shape[:-1]), device=tape.device)
    begin = (row * STRIDE + source.start(p.name)) % PERIOD
    windows = tape.as_strided((PERIOD, p.shape[-1]), (1, 1))
    return windows.index_select(0, begin).view(p.shape)
