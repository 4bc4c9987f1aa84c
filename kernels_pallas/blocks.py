"""Block sizes of attention, as data by chip, and what they take."""

from __future__ import annotations

from dataclasses import dataclass

from kernels_pallas.chip import Chip


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """queries: sizes of tiles, rising; a tile runs as the smallest that holds it. keys: of one turn of the loop.

    The largest tile, if of `large` queries and more, is a pipeline of products with `step` keys, `ahead` a turn; plain:
    whether it has turns without a mask too, for keys that all queries see.
    apart: what a turn gives is a branch, so that nothing else of the turn waits for it in registers, or fills its gaps.
    """

    queries: tuple[int, ...]
    keys: int
    large: int = 64
    step: int = 512
    ahead: int = 2
    apart: bool = False
    plain: bool = True

    @property
    def small(self) -> int:
        """Queries of the largest tile that is not `large`: the most that a tile of a tree may hold."""
        return max(n for n in self.queries if n < self.large)


SMALL = 1, 8
"""Sizes for rows that decode, and that verify drafts."""
TREE = 64
"""Tokens that a row may feed as a tree: the first, and guesses. They are bits of two words."""
LARGE = {"v5e": 64, "v5p": 64, "v6e": 64, "7x": 64, "interpreted": 8}
"""Chip -> queries of a tile of a prompt."""
KEYS = {"v5e": 512, "v5p": 512, "v6e": 512, "7x": 512, "interpreted": 128}
"""Chip -> keys of a block, before it is cut to fit."""
STEPS = {
    "v5e": (256, 4, True, False),
    "v5p": (256, 4, True, False),
    "v6e": (512, 4, False, False),
    "7x": (256, 4, False, True),
}
"""Chip -> step, ahead, apart and plain of its blocks: those that spill no registers."""
LEAST = 128
"""Keys of the smallest block: the lanes of a register."""


def tile(tokens: int, on: Chip) -> int:
    """Queries of the largest tile of a step with up to `tokens` tokens."""
    return max(size for size in (*SMALL, LARGE.get(on.name, 64)) if size <= tokens)


def pick(tokens: int, on: Chip, *, line: int, size: int, fixed: int, each: int) -> Blocks | None:
    """The blocks for a call with up to `tokens` tokens; None where not even the smallest fit.

    line, size: numbers of a token in the cache, and bytes of one. Beside keys, buffers take `fixed` bytes for each
    query of the largest tile, and `each` for each query and key.
    """
    most, keys = tile(tokens, on), KEYS.get(on.name, 256)
    while keys > LEAST and need(most, keys, line, size, fixed, each) > on.vmem // 2:
        keys //= 2
    if need(most, keys, line, size, fixed, each) > on.vmem // 2:
        return None
    queries = (*(n for n in SMALL if n < most), most)
    step, ahead, apart, plain = STEPS.get(on.name, (256, 2, True, True))
    return Blocks(queries=queries, keys=keys, step=step, ahead=ahead, apart=apart, plain=plain)


def need(most: int, keys: int, line: int, size: int, fixed: int, each: int) -> int:
    """Bytes of VMEM that a call takes, as `pick` counts them."""
    return 2 * keys * line * size + most * (fixed + keys * each)
