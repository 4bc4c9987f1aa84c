"""How ids become text: what an engine in a process of its own needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from engine.text.stages import Stage, chain, fresh


@dataclass(frozen=True, kw_only=True)
class Words:
    """Plain data, so that it crosses to another process, which then needs no transformers (over a second to import).

    names: the token of each id, None where there is none. special: tokens that may be skipped. decoder: of the
    `tokenizers` library, as JSON; "" is none. cleanup: whether spaces are cleaned up afterwards. eos: the id that ends
    a text.
    """

    names: tuple[str | None, ...]
    special: frozenset[str]
    decoder: str
    cleanup: bool
    eos: int | None

    def name(self, token: int) -> str | None:
        """The token of an id."""
        return self.names[token] if 0 <= token < len(self.names) else None

    def tokens(self, ids: Sequence[int], skip_special_tokens: bool) -> list[str]:
        """The tokens that a decoder sees: ids without a token are dropped, and special ones where it is asked."""
        found = map(self.name, ids)
        return [t for t in found if t is not None and not (skip_special_tokens and t in self.special)]

    def stages(self) -> list[Stage]:
        """The decoder, for one stream."""
        return fresh(self._stages)

    @cached_property
    def _stages(self) -> tuple[Stage, ...]:
        return chain(self.decoder, self.cleanup)
