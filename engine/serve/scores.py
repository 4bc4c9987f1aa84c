"""Logprobs as OpenAI's clients know them: of a chat, of a plain completion, and vLLM's of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from engine.run.answer import Answer
from engine.sched.scores import Score
from engine.serve.call import Piece
from engine.text.detokenize import Detokenizer
from engine.text.tokenizer import Tokenizer


class Shown(Protocol):
    """What a stream shows beside its texts."""

    def opening(self, piece: Piece) -> tuple[str, Any] | None:
        """Text and logprobs that come before an answer's first piece."""
        ...

    def of(self, piece: Piece) -> Any:
        """Logprobs of a piece."""
        ...


def spell(tokenizer: Tokenizer | None, token: int) -> tuple[str, bytes]:
    """A token as it is shown, and its bytes. What is no text by itself is shown by its bytes, escaped."""
    if tokenizer is None:
        return f"token_id:{token}", b""
    text, data = tokenizer.piece(token)
    return (text if data == text.encode("utf-8", "replace") else "".join(f"\\x{b:02x}" for b in data)), data


class Spoken:
    """Of a chat."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def opening(self, piece: Piece) -> None:
        """Nothing."""

    def of(self, piece: Piece) -> Any:
        """The field `logprobs`: each token with its bytes, and as many of the likeliest as were asked for."""
        return self.whole(piece.tokens, piece.scores)

    def whole(self, tokens: Sequence[int], scores: Sequence[Score]) -> dict[str, Any]:
        """The same of all tokens of an answer."""
        content = []
        for token, score in zip(tokens, scores, strict=True):
            top = [self._entry(t, p) for t, p in score.top]
            content.append({**self._entry(token, score.own), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = spell(self._tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": list(data)}


class Plain:
    """Of the answers to plain completions. echoes: what each answer begins with; None without echo."""

    def __init__(self, tokenizer: Tokenizer | None, answers: Sequence[Answer], echoes: Sequence[str] | None) -> None:
        self._parts = [
            _Part(tokenizer, answer, None if echoes is None else echoes[i]) for i, answer in enumerate(answers)
        ]

    def opening(self, piece: Piece) -> tuple[str, Any] | None:
        """The prompt, in front of an answer's first piece."""
        return self._parts[piece.index].opening(piece.prompt_scores)

    def of(self, piece: Piece) -> Any:
        """The field `logprobs`."""
        return self._parts[piece.index].take(piece.tokens, piece.scores)

    def whole(self, index: int, answer: Answer) -> dict[str, Any]:
        """All of an answer's at once."""
        part = self._parts[index]
        first = part.opening(answer.prompt_scores)
        rest = part.take(answer.ids, answer.scores)
        return rest if first is None else {name: first[1][name] + more for name, more in rest.items()}


class _Part:
    """One answer's: tokens, their logprobs, the likeliest with the token itself among them, and where each begins in
    the text. A token that completes no character begins where that character does."""

    def __init__(self, tokenizer: Tokenizer | None, answer: Answer, echo: str | None) -> None:
        self._tokenizer, self._prompt, self._echo = tokenizer, answer.request.tokens, echo
        self._skip = answer.request.params.skip_special_tokens
        self._offset = 0 if echo is None else len(echo)
        self._stream = self._text(True)
        self._opened = echo is None

    def opening(self, scores: Sequence[Score]) -> tuple[str, Any] | None:
        """The prompt's text and logprobs, once. Its first token has no logprob."""
        if self._opened or self._echo is None:
            return None
        self._opened = True
        text, at, offsets = self._text(False), 0, []
        for token in self._prompt:
            offsets.append(min(at, len(self._echo)))
            at += 0 if text is None else len(text.feed((token,)))
        known = [None, *scores] if scores else [None] * len(offsets)  # aborted: none came
        return self._echo, self._shape(self._prompt, known, offsets)

    def take(self, tokens: Sequence[int], scores: Sequence[Score]) -> dict[str, Any]:
        """Of the next tokens."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += 0 if self._stream is None else len(self._stream.feed((token,)))
        return self._shape(tokens, scores, offsets)

    def _text(self, follows: bool) -> Detokenizer | None:
        return None if self._tokenizer is None else Detokenizer(self._tokenizer.words, self._skip, follows)

    def _shape(self, tokens: Sequence[int], scores: Sequence[Score | None], offsets: list[int]) -> dict[str, Any]:
        names = [self._name(t) for t in tokens]
        top: list[dict[str, float] | None] = []
        for name, score in zip(names, scores, strict=True):
            if score is None:
                top.append(None)
                continue
            found: dict[str, float] = {}
            for token, logprob in score.top:
                found.setdefault(self._name(token), logprob)
            found.setdefault(name, score.own)
            top.append(found)
        own = [None if score is None else score.own for score in scores]
        return {"tokens": names, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}

    def _name(self, token: int) -> str:
        text, data = spell(self._tokenizer, token)
        return text if not data or data == text.encode("utf-8", "replace") else f"bytes:{text}"


def prompt_logprobs(tokenizer: Tokenizer | None, answer: Answer) -> list[dict[str, Any] | None]:
    """As vLLM has it: null for the first token, then {id: logprob, rank, text} of each token and the likeliest beside
    it. The rank of a token that is not among the likeliest is null."""
    out: list[dict[str, Any] | None] = [None]
    for token, score in zip(answer.prompt_ids[1:], answer.prompt_scores, strict=False):  # aborted: none came
        entry: dict[str, Any] = {}
        for rank, (other, logprob) in enumerate(score.top, 1):
            entry[str(other)] = {"logprob": logprob, "rank": rank, "decoded_token": spell(tokenizer, other)[0]}
        if str(token) not in entry:
            entry[str(token)] = {"logprob": score.own, "rank": None, "decoded_token": spell(tokenizer, token)[0]}
        out.append(entry)
    return out
