"""How tokens are chosen on the device, by the normative rules of backends.api.choice."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from backends.api.random import PARITY, ROTATIONS, ROUNDS
from backends.torch.inputs import Draws
from models_torch import ops

Array: TypeAlias = torch.Tensor
INF = 0x7F800000
"""Bits of float32 infinity."""
DIGITS = ((20, 2048), (10, 1024), (0, 1024))
"""31 bits as three digits: shift, values."""


def choose(logits: Array, draws: Draws | None, position: Array, raw: Array | None = None) -> Array:
    """Choose a token for each row. logits float32[O, V]; position int64[O]: of the token made. raw: the logits as the
    model gave them, where they were changed since.

    Returns int64[2, O]: tokens, and 1 where all logits are finite. Greedy rows cost an argmax and the check.
    """
    fused = ops.kernel("sample", logits.device.type)
    if fused is not None and not fused.supports(logits) and (draws is None or draws.every):
        return _fused(fused, logits, draws, position, raw)
    low, high = (logits if raw is None else raw).aminmax(dim=-1)
    finite = low.isfinite() & high.isfinite()
    if raw is not None and draws is not None:
        high = logits.amax(-1)
    tokens = logits.argmax(-1)
    if draws is not None:
        whole = len(draws.at) == len(logits)
        some = logits if whole else logits.index_select(0, draws.at)
        drawn = draw(some, high if whole else high[draws.at], draws, position[draws.at])
        if draws.every:
            drawn = torch.where(draws.temperature > 0, drawn, tokens)
        tokens = drawn if whole else tokens.index_copy_(0, draws.at, drawn)
    return torch.stack([tokens, finite.long()])


def _fused(kernel: Any, logits: Array, draws: Draws | None, position: Array, raw: Array | None) -> Array:
    """`choose` by the kernel of GPUs."""
    filters = None
    if draws is not None:
        cut = draws.top_k if draws.widest else None, draws.top_p if draws.nucleus else None
        filters = kernel.Filters(draws.temperature, *cut, draws.min_p, draws.seed, position)
    made: Array = kernel.sample(logits, filters)
    if raw is not None:
        low, high = raw.aminmax(dim=-1)
        made[1] = low.isfinite() & high.isfinite()
    return made


def draw(logits: Array, highest: Array, draws: Draws, position: Array) -> Array:
    """Tokens int64[N] of rows with a temperature. highest float32[N]: the largest of each row."""
    temperature = draws.temperature.float()
    if draws.every:
        temperature = torch.where(temperature > 0, temperature, 1)
    values = (logits - highest[:, None]).div_(temperature[:, None])
    keep: Array | None = None
    if draws.widest < 0:
        distance = values.abs().view(torch.int32)
        edge = within(torch.ones_like(values, dtype=torch.float64), distance, draws.top_k.double())
        keep = (distance <= edge[:, None]) | (draws.top_k == logits.shape[1])[:, None]
    elif draws.widest:
        top = values.topk(draws.widest, -1).values
        edge = top.gather(1, (draws.top_k.clamp(max=draws.widest) - 1)[:, None])
        keep = (values >= edge) | (draws.top_k == logits.shape[1])[:, None]
    if draws.nucleus:
        mass = values.double().exp_()
        distance = values.abs().view(torch.int32)
        if keep is not None:
            mass *= keep
            distance = distance.masked_fill(~keep, INF)
        near = distance <= nucleus(mass, distance, draws.top_p)[:, None]
        keep = near if keep is None else keep & near
    if draws.floor:
        likely = values.double().exp_() >= draws.min_p[:, None]
        keep = likely if keep is None else keep & likely
    keys = fold(draws.seed, position)
    if keep is not None and keep.device.type == "cpu":
        return among(values, keep, keys)
    return everywhere(values, keep, keys)


def everywhere(values: Array, keep: Array | None, keys: Array) -> Array:
    """The largest of values float32[N, V] with noise, where keep bool[N, V] allows: tokens int64[N]. Changes values."""
    values += gumbel(keys[:, :, None], torch.arange(values.shape[1], device=values.device)[None])
    if keep is not None:
        values.masked_fill_(~keep, -torch.inf)
    return values.argmax(-1)


def among(values: Array, keep: Array, keys: Array) -> Array:
    """`everywhere`, with noise only for the tokens that are left: for devices that need not be waited for."""
    row, token = keep.nonzero(as_tuple=True)
    scores = torch.full_like(values, -torch.inf)
    scores[row, token] = values[row, token] + gumbel(keys[:, row], token)
    return scores.argmax(-1)


def nucleus(mass: Array, distance: Array, p: Array) -> Array:
    """The smallest distance within which the mass is at least p of the whole; int32[N]. Digit by digit, no sort.

    mass float64[N, V]; distance int32[N, V]: bits of a float32 >= 0, whose order is that of the floats. p float64[N]: 1
    or more keeps all.
    """
    return torch.where(p < 1, within(mass, distance, mass.sum(-1) * p), INF)


def within(mass: Array, distance: Array, need: Array) -> Array:
    """The smallest distance int32[N] within which lies a mass of at least need float64[N]."""
    need, edge = need[:, None], torch.zeros_like(distance[:, :1])
    for shift, size in DIGITS:
        edge *= size
        # bucket 0 holds what is nearer than the digits found so far, the last one what is farther
        bucket = (distance >> shift).sub_(edge).clamp_(-1, size).add_(1).long()
        total = mass.new_zeros(len(mass), size + 2).scatter_add_(1, bucket, mass).cumsum_(-1)
        edge += ((total < need).sum(-1, keepdim=True) - 1).clamp_(0, size - 1)
    return edge[:, 0]


def fold(seed: Array, position: Array) -> Array:
    """The key of each row's noise: seed int64[N, 2] (words) at position int64[N] -> int32[2, N]."""
    high, low = wrap(seed).unbind(1)
    at = wrap(position)
    return torch.stack(threefry((high, low), (torch.zeros_like(at), at)))


def gumbel(keys: Array, tokens: Array) -> Array:
    """Noise float32 of keys int32[2, ...] and token ids that broadcast: backends.api.random.gumbel."""
    ids = wrap(tokens)
    x0, x1 = threefry((keys[0], keys[1]), (torch.zeros_like(ids), ids))
    u = right(x0.bitwise_xor_(x1), 9).float().add_(0.5).mul_(2.0**-23)
    return u.log_().neg_().log_().neg_()


def threefry(key: tuple[Array, Array], count: tuple[Array, Array]) -> tuple[Array, Array]:
    """threefry2x32 of pairs of int32 arrays that broadcast: sums wrap at 32 bits, as torch lacks uint32."""
    keys = (*key, key[0] ^ key[1] ^ PARITY)
    x0, x1 = count[0] + keys[0], count[1] + keys[1]
    for group in range(ROUNDS // 4):
        for turn in ROTATIONS[group % 2]:
            x0 += x1
            high = right(x1, 32 - turn)
            x1 = x1.bitwise_left_shift_(turn).bitwise_or_(high).bitwise_xor_(x0)
        x0 += keys[(group + 1) % 3]
        x1 += keys[(group + 2) % 3] + (group + 1)
    return x0, x1


def right(x: Array, by: int) -> Array:
    """Logical shift right of int32."""
    return x.bitwise_right_shift(by).bitwise_and_((1 << (32 - by)) - 1)


def wrap(x: Array) -> Array:
    """int64 words below 2^32 -> int32 with the same bits."""
    return x.bitwise_left_shift(32).bitwise_right_shift_(32).int()
