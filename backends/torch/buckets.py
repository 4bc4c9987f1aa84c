"""The shapes that small steps on a GPU are padded to: each is captured once, and replayed for every step that fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from backends.api.limits import Limits
from backends.torch.branches import FEWEST, Layout
from kernels_cuda import cascade

FEW = 32
"""Up to so many rows, steps of decode rows are padded to powers of two; beyond, to multiples of this."""
MIXED = (64, 128, 256, 512)
"""Tokens that small steps with parts of prompts are padded to. Larger ones keep a device busy as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """rows, tokens: padded. edits: of each group's page tables, what rows that go on can need. even: every row has one
    token. branches: of steps whose rows read pages together; None = each by itself."""

    rows: int
    tokens: int
    edits: tuple[int, ...]
    even: bool
    branches: cascade.Shape | None = None

    def fields(self) -> dict[str, int]:
        """The parts of the packed buffer, in order, and their sizes; of each group g: base, entries and pages of its
        edits. seed: high and low word of each row in turns."""
        rows, tokens = self.rows, self.tokens
        out = dict.fromkeys(("slots", "starts", "lens", "ends", "into"), rows)
        out |= {"first": rows + 1, "tokens": tokens, "row": tokens, "offset": tokens}
        for g, edits in enumerate(self.edits):
            out |= {f"base{g}": rows, f"entry{g}": edits, f"page{g}": edits}
        if self.branches is not None:
            out |= {"tiles": 5 * self.branches.tiles, "covered": rows, "used": rows}
        return out | {"seed": 2 * rows} | dict.fromkeys(("top_k", "temperature", "top_p", "min_p"), rows)


@lru_cache(maxsize=64)
def parts(shape: Shape) -> tuple[dict[str, slice], int]:
    """Where each part of a buffer lies, and the buffer's size."""
    out, at = {}, 0
    for name, size in shape.fields().items():
        out[name] = slice(at, at + size)
        at += size
    return out, at


def padded(rows: int) -> int:
    """Rows that so many are padded to, where a step has room for them."""
    return 1 << (rows - 1).bit_length() if rows <= FEW else -(-rows // FEW) * FEW


def ladder(limits: Limits, layout: Layout | None = None) -> tuple[Shape, ...]:
    """The shapes that are captured, the largest first. layout: of rows that read pages together."""
    most = limits.max_rows
    rows = sorted({min(padded(n), most) for n in range(1, most + 1)})
    mixed = [tokens for tokens in MIXED if tokens <= limits.max_tokens]
    shapes = [_shape(n, n, limits, True) for n in rows]
    shapes += [_shape(min(tokens, most), tokens, limits, False) for tokens in mixed]
    if layout is not None:
        more = [s for s in shapes if s.even and s.rows >= FEWEST]
        shapes += [replace(s, branches=layout.bound(s.rows, limits.max_len)) for s in more]
    return tuple(sorted(shapes, key=lambda s: (s.tokens, s.rows), reverse=True))


def one(limits: Limits) -> tuple[Shape, ...]:
    """The shape of a backend whose steps all have as many tokens, one a row or several."""
    return (_shape(limits.max_rows, limits.max_tokens, limits, False),)


def _shape(rows: int, tokens: int, limits: Limits, even: bool) -> Shape:
    edits = tuple(rows + tokens // group.page for group in limits.groups)
    return Shape(rows=rows, tokens=tokens, edits=edits, even=even)


def fit(shapes: tuple[Shape, ...], rows: int, tokens: int, branched: bool = False) -> Shape | None:
    """The smallest of these shapes (largest first) for so many rows and tokens; None where none is. branched: one whose
    rows read pages together, where there is one."""
    even = rows == tokens and any(s.even for s in shapes)
    fits = [s for s in shapes if s.even == even and s.rows >= rows and s.tokens >= tokens]
    found = [s for s in fits if (s.branches is not None) == (branched and even and fits[-1].rows >= FEWEST)]
    return found[-1] if found else None
