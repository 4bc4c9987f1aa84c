"""What has come back of a request: its ids, its text and its logprobs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from backends.api.random import fold
from engine.errors import BackendLost, RadixmeshError
from engine.sched.request import Output, Request
from engine.sched.scores import Score
from engine.sched.stop import Finish
from engine.text.detokenize import TextStream
from engine.text.tokenizer import Tokenizer


def several(request: Request, n: int) -> list[Request]:
    """A request for each of n answers to one prompt, which share what is computed of it. Their seeds come from one: the
    first answer is that of n = 1."""
    if n == 1:
        return [request]
    return [replace(request, rid=f"{request.rid}-{i}", seed=fold(request.seed, i), group=request.rid) for i in range(n)]


@dataclass(slots=True, kw_only=True)
class Answer:
    """What has come back of a request. stream: makes its text; None without a tokenizer. scores: of its ids, and
    prompt_scores of the prompt's from params.logprob_start_len + 1 on, where they were asked for. version: of the
    weights that made its last token; None until it ended."""

    request: Request
    stream: TextStream | None
    text: str = ""
    ids: list[int] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    prompt_scores: list[Score] = field(default_factory=list)
    cached: int = 0
    finish: Finish | None = None
    error: RadixmeshError | None = None
    version: int | None = None

    def take(self, output: Output) -> str:
        """Add what is new, and give the new text. Raises BackendLost when the engine is gone."""
        if isinstance(output.error, BackendLost):
            raise output.error
        self.ids += output.tokens
        if output.logprobs is not None:
            self.scores += output.logprobs.rows()
        if output.prompt_logprobs is not None:
            self.prompt_scores += output.prompt_logprobs.rows()
        self.cached, self.finish = output.cached_tokens, output.finish
        self.error = output.error
        self.version = None if output.finish is None else output.version
        new = "" if self.stream is None else self._piece(self.stream, output)
        self.text += new
        return new

    def _piece(self, stream: TextStream, output: Output) -> str:
        """New text: without the id that stopped it, and up to the string that did, unless no_stop_trim."""
        if output.finish is None:
            return stream.feed(output.tokens)
        matched, trim = output.finish.matched, not self.request.params.no_stop_trim
        tokens = output.tokens[:-1] if trim and isinstance(matched, int) else output.tokens
        return stream.feed(tokens) + stream.finish(matched if trim and isinstance(matched, str) else None)

    @classmethod
    def of(cls, request: Request, tokenizer: Tokenizer | None) -> Answer:
        """The answer to a request, empty."""
        params, text = request.params, None
        if tokenizer is not None:
            stop = () if params.no_stop_trim else params.stop
            text = TextStream(tokenizer.words, stop, params.skip_special_tokens, params.min_new_tokens)
        return cls(request=request, stream=text)

    @property
    def mean(self) -> float:
        """The mean logprob of its tokens, by which best_of chooses; below all others where it has none."""
        return sum(s.own for s in self.scores) / len(self.scores) if self.scores else -math.inf

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens of the prompt that are listed with logprobs; the first of them has none."""
        params = self.request.params
        return () if params.prompt_logprobs is None else self.request.tokens[params.logprob_start_len :]

    def result(self, spell: Callable[[int], str] | None = None) -> dict[str, Any]:
        """As SGLang's users know it. spell: gives the texts that stand beside logprobs."""
        text = {} if self.stream is None else {"text": self.text}
        return text | {
            "output_ids": list(self.ids),
            "meta_info": {
                "id": self.request.rid,
                "prompt_tokens": len(self.request.tokens),
                "completion_tokens": len(self.ids),
                "cached_tokens": self.cached,
                "finish_reason": self._reason(),
                "seed": self.request.seed,
                "weight_version": self.version,
                **self._logprobs(spell or (lambda token: None)),
            },
        }

    def _logprobs(self, spell: Callable[[int], str | None]) -> dict[str, Any]:
        """(logprob, id, text or None) of each token, and lists of them for the likeliest."""
        params = self.request.params
        out: dict[str, Any] = {}
        lists: tuple[tuple[str, int | None, Sequence[int], Sequence[Score | None]], ...] = (
            ("input", params.prompt_logprobs or params.logprobs, self.prompt_ids, [None, *self.prompt_scores]),
            ("output", params.logprobs, self.ids, self.scores),
        )
        if params.logprobs is None and params.prompt_logprobs is None:
            return {}
        for name, count, ids, scores in lists:
            given = list(zip(ids, scores, strict=False))  # the prompt's come with the first token
            out[f"{name}_token_logprobs"] = [(s and s.own, i, spell(i)) for i, s in given]
            if count:
                out[f"{name}_top_logprobs"] = [s and [(p, t, spell(t)) for t, p in s.top] for _, s in given]
        return out

    def _reason(self) -> dict[str, Any] | None:
        if self.finish is None:
            return None
        if self.finish.kind == "length":
            return {"type": "length", "length": len(self.ids)}
        if self.finish.kind == "stop":
            return {"type": "stop", "matched": self.finish.matched}
        return {"type": "abort", "message": "the request was aborted" if self.error is None else str(self.error)}
