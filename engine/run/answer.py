"""What has come back of a request: its ids and its text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.errors import BackendLost, RadixmeshError
from engine.sched.request import Output, Request
from engine.sched.stop import Finish
from engine.text.detokenize import TextStream
from engine.text.tokenizer import Tokenizer


@dataclass(slots=True, kw_only=True)
class Answer:
    """What has come back of a request. stream: makes its text; None without a tokenizer."""

    request: Request
    stream: TextStream | None
    text: str = ""
    ids: list[int] = field(default_factory=list)
    cached: int = 0
    finish: Finish | None = None
    error: RadixmeshError | None = None

    def take(self, output: Output) -> str:
        """Add what is new, and give the new text. Raises BackendLost when the engine is gone."""
        if isinstance(output.error, BackendLost):
            raise output.error
        self.ids += output.tokens
        self.cached, self.finish = output.cached_tokens, output.finish
        self.error = output.error
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
            text = TextStream(tokenizer, () if params.no_stop_trim else params.stop, params.skip_special_tokens)
        return cls(request=request, stream=text)

    def result(self) -> dict[str, Any]:
        """As SGLang's users know it."""
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
            },
        }

    def _reason(self) -> dict[str, Any] | None:
        if self.finish is None:
            return None
        if self.finish.kind == "length":
            return {"type": "length", "length": len(self.ids)}
        if self.finish.kind == "stop":
            return {"type": "stop", "matched": self.finish.matched}
        return {"type": "abort", "message": "the request was aborted" if self.error is None else str(self.error)}
