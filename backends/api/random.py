"""The noise of sampling, which is normative: threefry2x32 bits keyed by a seed, a position and a token id.

Every backend makes the same bits, so the same logits give the same token whatever the batch, the slot or the device.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); equal to `jax.random.bits` of a folded key.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from backends.api.step import F32, I32, U32, U64

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
ROUNDS = 20


def threefry2x32(key: tuple[U32, U32], count: tuple[U32, U32]) -> tuple[U32, U32]:
    """20 rounds of threefry2x32. key, count: pairs of uint32 arrays that broadcast -> a pair of uint32 arrays."""
    k0, k1 = (np.asarray(k, np.uint32) for k in key)
    keys = (k0, k1, k0 ^ k1 ^ np.uint32(PARITY))
    x0, x1 = np.broadcast_arrays(count[0] + keys[0], count[1] + keys[1])
    for group in range(ROUNDS // 4):
        for turn in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(turn)) | (x1 >> np.uint32(32 - turn))
            x1 = x1 ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def bits(seeds: U64, positions: I32, vocab: int) -> U32:
    """uint32[R, vocab] for seeds uint64[R] and positions int32[R] of the tokens made (0 = a first token)."""
    words = np.asarray(seeds, np.uint64)[:, None]
    zero = np.zeros((1, 1), np.uint32)
    key = (words >> np.uint64(32)).astype(np.uint32), (words & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    folded = threefry2x32(key, (zero, np.asarray(positions, np.int64)[:, None].astype(np.uint32)))
    x0, x1 = threefry2x32(folded, (zero, np.arange(vocab, dtype=np.uint32)[None]))
    return x0 ^ x1


def uniform(bits: U32) -> F32:
    """The 23 high bits as float32 strictly between 0 and 1: ((bits >> 9) + 0.5) * 2**-23, exact."""
    return ((bits >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)


def gumbel(seeds: U64, positions: I32, vocab: int) -> NDArray[np.float32]:
    """Standard Gumbel noise float32[R, vocab]: -log(-log(u)), each log rounded to float32."""
    return -np.log(-np.log(uniform(bits(seeds, positions, vocab))))


def fold(seed: int, index: int) -> int:
    """The 64-bit seed of the index-th answer to one prompt; that of the first is the seed itself."""
    if index == 0:
        return seed
    key = np.array([seed >> 32], np.uint32), np.array([seed & 0xFFFFFFFF], np.uint32)
    high, low = threefry2x32(key, (np.array([0xFFFFFFFF], np.uint32), np.array([index], np.uint32)))
    return int(high[0]) << 32 | int(low[0])
