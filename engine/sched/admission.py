"""What a step has room for, and what a request may ask at all."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np

from backends.api.limits import Limits
from engine.errors import ConfigError, ContextOverflow, InvalidRequest
from engine.sched.features import check_features
from engine.sched.request import Request, Run


class Room:
    """What is left of the step being planned."""

    __slots__ = ("bias", "edits", "history", "masks", "rows", "tokens")

    def __init__(self, limits: Limits) -> None:
        self.rows, self.tokens = limits.max_rows, limits.max_tokens
        self.history, self.masks, self.bias = limits.max_history, limits.max_masks, limits.max_bias
        self.edits = [limits.max_edits] * len(limits.groups)

    def fits(self, tokens: int) -> bool:
        """Whether one more row of so many tokens fits."""
        return self.rows > 0 and 0 < tokens <= self.tokens

    def history_fits(self, run: Run) -> bool:
        """Whether the history that seating this run sends fits."""
        return run.start < 0 or not run.request.params.penalised or len(run.fill) <= self.history

    def bias_fits(self, run: Run) -> bool:
        """Whether the logit bias of one more row fits."""
        return len(run.request.params.logit_bias) <= self.bias

    def edits_fit(self, edits: Sequence[Sequence[object]]) -> bool:
        """Whether a row's page-table edits fit, per group."""
        return all(len(e) <= left for e, left in zip(edits, self.edits, strict=True))

    def take(self, tokens: int, edits: Sequence[Sequence[object]], history: int, masked: bool, bias: int) -> None:
        """Take one row out of the room."""
        self.bias -= bias
        self.rows -= 1
        self.tokens -= tokens
        self.history -= history
        self.masks -= masked
        self.edits = [left - len(e) for e, left in zip(edits, self.edits, strict=True)]


def capacity(limits: Limits) -> int:
    """Positions that one request may reach when it is alone. Raises ConfigError when the pools can't hold max_len."""
    for group, pages in zip(limits.groups, limits.pages, strict=True):
        reach = limits.max_len + limits.max_draft
        if group.kind == "window":
            reach = min(reach, group.window + limits.max_tokens + 2 * group.page)
        need = 2 if group.kind == "state" else -(-reach // group.page)
        if pages < need:
            raise ConfigError(
                f"cache.tokens: one request of {limits.max_len} tokens needs {need} pages, the {group.kind} cache has "
                f"{pages}; raise cache.tokens or lower model.max_len",
                field="cache.tokens",
            )
    return limits.max_len


def check_request(request: Request, limits: Limits, room: int, taken: Container[str]) -> None:
    """Raise InvalidRequest or ContextOverflow for what can't be honoured. room: positions a request may reach."""
    tokens = np.asarray(request.tokens)
    if request.rid in taken:
        raise InvalidRequest(f"rid: {request.rid!r} is in use", field="rid")
    if tokens.size == 0:
        raise InvalidRequest("prompt: is empty; give at least one token", field="prompt")
    if tokens.dtype.kind not in "iu":
        raise InvalidRequest("token_ids: must be integers", field="token_ids")
    if tokens.min() < 0 or tokens.max() >= limits.vocab:
        bad = int(tokens[(tokens < 0) | (tokens >= limits.vocab)][0])
        raise InvalidRequest(f"token_ids: {bad} is not in the vocabulary of {limits.vocab}", field="token_ids")
    if tokens.size >= room:
        raise ContextOverflow(
            f"prompt: {tokens.size} tokens, and the context holds {room} with at least one for the answer",
            field="prompt",
        )
    check_features(request, limits)
