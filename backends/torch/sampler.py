"""How tokens are chosen on the device, by the normative rules of backends.api.choice."""

from __future__ import annotations

import torch

from backends.api.random import PARITY, ROTATIONS, ROUNDS
from backends.torch.inputs import Draws

Array = torch.Tensor
INF = 0x7F800000
"""Bits of float32 infinity."""


def choose(logits: Array, draws: Draws | None, position: Array) -> Array:
    """Choose a token for each row. logits float32[O, V]; position int64[O]: of the token made.

    Returns int64[2, O]: tokens, and 1 where all logits are finite. Greedy rows cost an argmax and the check.
    """
    low, high = logits.aminmax(dim=-1)
    tokens = logits.argmax(-1)
    if draws is not None:
        whole = len(draws.at) == len(logits)
        some = logits if whole else logits.index_select(0, draws.at)
        drawn = draw(some, high if whole else high[draws.at], draws, position[draws.at])
        tokens = drawn if whole else tokens.index_copy_(0, draws.at, drawn)
    return torch.stack([tokens, (low.isfinite() & high.isfinite()).long()])


def draw(logits: Array, highest: Array, draws: Draws, position: Array) -> Array:
    """Tokens int64[N] of rows with a temperature. highest float32[N]: the largest of each row."""
    values = (logits - highest[:, None]).div_(draws.temperature.float()[:, None])
    keep: Array | None = None
    if draws.widest:
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
    scores = values.add_(gumbel(draws.seed, position, logits.shape[1]))
    if keep is not None:
        scores.masked_fill_(~keep, -torch.inf)
    return scores.argmax(-1)


def nucleus(mass: Array, distance: Array, p: Array) -> Array:
    """The smallest distance within which the mass is at least p of the whole; int32[N]. Bisection over the bits.

    mass float64[N, V]; distance int32[N, V]: bits of a float32 >= 0, whose order is that of the floats. p float64[N]: 1
    or more keeps all.
    """
    need = mass.sum(-1) * p
    low = torch.full_like(need, -1, dtype=torch.int32)
    high = torch.full_like(low, INF)
    for _ in range(31):
        middle = low + (high - low) // 2
        enough = (mass * (distance <= middle[:, None])).sum(-1) >= need
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle)
    return torch.where(p < 1, high, INF)


def gumbel(seed: Array, position: Array, vocab: int) -> Array:
    """Noise float32[N, vocab] of seed int64[N, 2] (words) and position int64[N]: backends.api.random.gumbel."""
    words, at = wrap(seed), wrap(position)[:, None]
    key = threefry(words[:, :1], words[:, 1:], torch.zeros_like(at), at)
    ids = torch.arange(vocab, dtype=torch.int32, device=seed.device).expand(len(seed), -1)
    x0, x1 = threefry(*key, torch.zeros_like(ids), ids)
    u = shift(x0.bitwise_xor_(x1), 9).float().add_(0.5).mul_(2.0**-23)
    return u.log_().neg_().log_().neg_()


def threefry(k0: Array, k1: Array, c0: Array, c1: Array) -> tuple[Array, Array]:
    """threefry2x32 of keys int32[N, 1] and counters int32[N, M]: sums wrap at 32 bits, as torch lacks uint32."""
    keys = (k0, k1, k0 ^ k1 ^ PARITY)
    x0, x1 = c0 + keys[0], c1 + keys[1]
    for group in range(ROUNDS // 4):
        for turn in ROTATIONS[group % 2]:
            x0 += x1
            high = shift(x1, 32 - turn)
            x1 = x1.bitwise_left_shift_(turn).bitwise_or_(high).bitwise_xor_(x0)
        x0 += keys[(group + 1) % 3]
        x1 += keys[(group + 2) % 3] + (group + 1)
    return x0, x1


def shift(x: Array, by: int) -> Array:
    """Logical shift right of int32."""
    return x.bitwise_right_shift(by).bitwise_and_((1 << (32 - by)) - 1)


def wrap(x: Array) -> Array:
    """int64 words below 2^32 -> int32 with the same bits."""
    return x.bitwise_left_shift(32).bitwise_right_shift_(32).int()
