"""What a request may make next: everything that bounds its vocabulary, as one mask a row.

A source is late where its mask depends on the tokens themselves: then the row waits until they are committed
(docs/contract.md, rule 2). What depends on nothing, or on the number of tokens alone, is known before they are, and
never stalls the step that is planned while another is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from backends.api.step import U32
from engine.sched.grammar import Grammar
from engine.sched.request import Request
from engine.sched.stop import stopping

Words = tuple[tuple[int, ...], ...]


class Source(Protocol):
    """One reason why a token may not be made. late: the mask depends on tokens that may not be committed yet."""

    late: bool

    def binds(self, made: int) -> bool:
        """Whether the token after `made` others has a mask."""
        ...

    def accept(self, tokens: Sequence[int]) -> None:
        """Tokens were committed."""
        ...

    def mask(self) -> U32:
        """uint32[ceil(vocab / 32)], bit v % 32 of word v // 32 allows v; bits past the vocabulary mean nothing. Only
        read; a late source's is right when every token before was accepted."""
        ...


class Fixed:
    """A mask that never changes, for all tokens or for those before the first `until`."""

    late = False

    def __init__(self, mask: U32, until: int | None = None) -> None:
        self._mask, self._until = mask, until

    def binds(self, made: int) -> bool:
        return self._until is None or made < self._until

    def accept(self, tokens: Sequence[int]) -> None:
        pass

    def mask(self) -> U32:
        return self._mask


class Unsaid:
    """Never the last token of a sequence whose others were just made. Sequences have at least two tokens."""

    late = True

    def __init__(self, words: Words, vocab: int) -> None:
        self._vocab, self._longest = vocab, max(len(w) for w in words) - 1
        self._all = everything(vocab)
        self._made: list[int] = []
        self._after: dict[int, list[tuple[int, ...]]] = {}
        for word in words:
            self._after.setdefault(word[-2], []).append(word)

    def binds(self, made: int) -> bool:
        return made > 0

    def accept(self, tokens: Sequence[int]) -> None:
        self._made = [*self._made, *tokens][-self._longest :]

    def mask(self) -> U32:
        found = self._after.get(self._made[-1], ()) if self._made else ()
        last = [w[-1] for w in found if tuple(self._made[1 - len(w) :]) == w[:-1]]
        return without(last, self._vocab) if last else self._all


class Guided:
    """A grammar as a source."""

    late = True

    def __init__(self, grammar: Grammar) -> None:
        self.accept, self.mask = grammar.accept, grammar.mask

    def binds(self, made: int) -> bool:
        return True


class Masks:
    """All sources of one request. late: see Source."""

    __slots__ = ("_sources", "late")

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)
        self.late = any(s.late for s in sources)

    def binds(self, made: int) -> bool:
        """Whether the token after `made` others has a mask."""
        return any(s.binds(made) for s in self._sources)

    def accept(self, tokens: Sequence[int]) -> None:
        """Tokens were committed."""
        for source in self._sources:
            source.accept(tokens)

    def mask(self, made: int) -> U32:
        """What may follow `made` tokens, as `Source.mask`; some source must bind there."""
        masks = [s.mask() for s in self._sources if s.binds(made)]
        return masks[0] if len(masks) == 1 else np.bitwise_and.reduce(masks)


def masks_of(request: Request, vocab: int) -> Masks | None:
    """What bounds a request's vocabulary, in its first state; None where nothing does. Ids are in the vocabulary."""
    params = request.params
    sources: list[Source] = []
    if params.allowed_token_ids is not None:
        sources.append(Fixed(only(params.allowed_token_ids, vocab)))
    stops = stopping(params, request.eos)
    if params.min_new_tokens and stops:
        sources.append(Fixed(without([i for i in stops if i < vocab], vocab), params.min_new_tokens))
    single = [w[0] for w in request.bad_words if len(w) == 1]
    if single:
        sources.append(Fixed(without(single, vocab)))
    several = tuple(w for w in request.bad_words if len(w) > 1)
    if several:
        sources.append(Unsaid(several, vocab))
    if request.grammar is not None:
        sources.append(Guided(request.grammar))
    return Masks(sources) if sources else None


def everything(vocab: int) -> U32:
    """The mask that allows all."""
    return np.full(-(-vocab // 32), 0xFFFFFFFF, np.uint32)


def only(ids: Sequence[int], vocab: int) -> U32:
    """The mask that allows these."""
    bits = np.zeros(-(-vocab // 32) * 32, bool)
    bits[list(ids)] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def without(ids: Sequence[int], vocab: int) -> U32:
    """The mask that allows all but these."""
    return ~only(ids, vocab)
