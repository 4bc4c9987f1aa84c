"""What may be seated beside what runs, and what a request may ask at all."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from math import ceil, isfinite

import numpy as np

from backends.api.limits import Limits
from engine.cache.radix import as_key
from engine.errors import ConfigError, ContextOverflow, InvalidRequest
from engine.sched.features import check_features
from engine.sched.request import Request, Run

HIGH, LOW, RISE, FALL = 0.7, 0.1, 0.1, 0.001
MAX_TIMEOUT = 7 * 86400.0
"""Seconds that a request may give itself."""
MAX_PRIORITY = 2**31 - 1
"""It crosses to other processes in 32 bits."""
FORESEEN = 4096
"""Tokens still to be made that are counted of one request at most: many could, few do."""


class Estimate:
    """How much of what running requests may still make gets pages ahead of those that wait.

    share: begins high, falls a little with each step and rises with each preemption that a lack of pages made, so that
    it settles just above what the requests really make (SGLang's new_token_ratio).
    """

    __slots__ = ("_tokens", "share")

    def __init__(self) -> None:
        self.share, self._tokens = HIGH, 0

    def fall(self) -> None:
        """A step went well."""
        self.share = max(LOW, self.share - FALL)

    def rise(self) -> None:
        """The pages did not do."""
        self.share = min(1.0, self.share + RISE)

    def count(self, running: Iterable[Run]) -> None:
        """These run."""
        self._tokens = sum([min(run.most - len(run.out), FORESEEN) for run in running])

    def add(self, run: Run) -> None:
        """And this one."""
        self._tokens += min(run.most - len(run.out), FORESEEN)

    def ahead(self, run: Run) -> int:
        """Tokens to keep free for all that run, if this one did too."""
        return ceil(self.share * (self._tokens + min(run.most - len(run.out), FORESEEN)))


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


def deadline(timeout: float | None, now: float) -> float | None:
    """When a request ends that gives itself `timeout` seconds from now on; None is never. Raises InvalidRequest."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise InvalidRequest(f"timeout: must be a number of seconds, not {timeout!r}", field="timeout")
    if not 0 < timeout <= MAX_TIMEOUT:
        raise InvalidRequest(
            f"timeout: must be above 0 and at most {MAX_TIMEOUT:g} seconds, not {timeout:g}", field="timeout"
        )
    return now + timeout


def check_request(request: Request, limits: Limits, room: int, taken: Container[str]) -> bytes:
    """Raise InvalidRequest or ContextOverflow for what can't be honoured. room: positions a request may reach. Gives
    the prompt as the tree compares it."""
    if request.rid in taken:
        raise InvalidRequest(f"rid: {request.rid!r} is in use", field="rid")
    if not len(request.tokens):
        raise InvalidRequest("prompt: is empty; give at least one token", field="prompt")
    key = _key(request.tokens, limits.vocab)
    if len(request.tokens) >= room:
        raise ContextOverflow(
            f"prompt: {len(request.tokens)} tokens, and the context holds {room} with at least one for the answer",
            field="prompt",
        )
    if isinstance(request.priority, bool) or not isinstance(request.priority, int):
        raise InvalidRequest(f"priority: must be an integer, not {request.priority!r}", field="priority")
    if abs(request.priority) > MAX_PRIORITY:
        raise InvalidRequest(f"priority: must be between {-MAX_PRIORITY} and {MAX_PRIORITY}", field="priority")
    if request.deadline is not None and not isfinite(request.deadline):
        raise InvalidRequest("deadline: must be a finite number of seconds", field="deadline")
    check_features(request, limits)
    return key


def _key(tokens: Sequence[int], vocab: int) -> bytes:
    """engine.cache.radix.as_key of ids of the vocabulary. Raises InvalidRequest."""
    try:
        key = as_key(tokens)
        ids = np.frombuffer(key, np.int32)
        if ids.min() >= 0 and ids.max() < vocab:
            return key
    except TypeError:
        raise InvalidRequest("token_ids: must be integers", field="token_ids") from None
    except OverflowError:
        pass
    bad = next(int(token) for token in tokens if not 0 <= token < vocab)
    raise InvalidRequest(f"token_ids: {bad} is not in the vocabulary of {vocab}", field="token_ids")
