"""Text as it is made, equal to decoding all at once: the pieces of any split of any ids join to `Tokenizer.decode`."""

from __future__ import annotations

from collections.abc import Sequence

from engine.text.stages import Stage, beginning, fresh
from engine.text.words import Words


class Detokenizer:
    """One stream of ids to text. What was given is never taken back; what may still change is kept.

    Kept are: the bytes of an unfinished character, a run of byte-fallback tokens (one bad byte spoils the run), and
    what clean-up may still rewrite. The cost of an id does not depend on how many came before it.
    follows: the ids follow a prompt, so the first of them is decoded like any other: tokenizers that drop the space
    before a text's first word don't drop it here.
    """

    def __init__(self, words: Words, skip_special_tokens: bool = True, follows: bool = False) -> None:
        self._words, self._skip = words, skip_special_tokens
        self._stages = words.stages()
        if follows:
            for stage in self._stages:
                stage.follow()

    def feed(self, ids: Sequence[int]) -> str:
        """The text that is settled by these ids."""
        items = self._words.tokens(ids, self._skip)
        for stage in self._stages:
            items = stage.feed(items)
        return "".join(items)

    def peek(self) -> str:
        """The text that is kept back, as it would read if nothing followed; without characters that aren't complete."""
        return _rest(fresh(self._stages), True)

    def finish(self) -> str:
        """The rest of the text. The stream can't be used afterwards."""
        return _rest(self._stages, False)


def _rest(stages: Sequence[Stage], cut: bool) -> str:
    items: list[str] = []
    for stage in stages:
        items = stage.feed(items) + stage.finish(cut)
    return "".join(items)


class StopStrings:
    """Finds the token at which a text first contains one of the stop strings; the loop's Stopper.

    A stop string counts from the first token whose text, decoded with all before it, shows it. Where several end there,
    the one that begins first is `matched`; of those that begin together, the first of `strings`. after: text that was
    settled by so many first tokens is not looked at.
    """

    def __init__(self, words: Words, strings: Sequence[str], skip_special_tokens: bool = True, after: int = 0) -> None:
        self.matched: str | None = None
        self._blind = after
        self._strings = tuple(strings)
        self._detokenizer = Detokenizer(words, skip_special_tokens, follows=True)
        self._window = max((len(s) for s in strings), default=1) - 1
        self._tail = ""

    def feed(self, tokens: Sequence[int]) -> int | None:
        """How many of these tokens belong to the output if a stop string was completed, else None."""
        blind = min(self._blind, len(tokens))
        self._blind -= blind
        self._detokenizer.feed(tokens[:blind])
        for i, token in enumerate(tokens[blind:], blind):
            text = self._tail + self._detokenizer.feed((token,))
            shown = text + self._detokenizer.peek()
            found = [(at, order) for order, s in enumerate(self._strings) if (at := shown.find(s)) >= 0]
            if found:
                self.matched = self._strings[min(found)[1]]
                return i + 1
            self._tail = text[max(0, len(text) - self._window) :]
        return None


class TextStream:
    """The text of an answer to a prompt: detokenised, cut before the stop string, pieces never taken back.

    stop: strings that may end the text; an end of the text that begins one of them is kept until it is told apart.
    after: as StopStrings has it.
    """

    def __init__(
        self, words: Words, stop: Sequence[str] = (), skip_special_tokens: bool = True, after: int = 0
    ) -> None:
        self._detokenizer = Detokenizer(words, skip_special_tokens, follows=True)
        self._stop = tuple(stop)
        self._held = ""
        self._blind = after if stop else 0

    def feed(self, ids: Sequence[int]) -> str:
        """The text that is settled by these ids and is not the beginning of a stop string."""
        if self._blind:
            blind = min(self._blind, len(ids))
            self._blind -= blind
            return self._detokenizer.feed(ids[:blind]) + (self.feed(ids[blind:]) if ids[blind:] else "")
        text = self._held + self._detokenizer.feed(ids)
        first = min((at for s in self._stop if (at := text.find(s)) >= 0), default=len(text))
        keep = max(beginning(text, self._stop), len(text) - first)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self, matched: str | None = None) -> str:
        """The rest, up to the stop string that ended the text, if one did."""
        text, self._held = self._held + self._detokenizer.finish(), ""
        return text if matched is None else text.partition(matched)[0]
