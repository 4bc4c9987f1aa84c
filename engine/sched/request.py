"""A request, what comes back of it, and its life in the scheduler."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.cache.sequence import SequenceCache
from engine.errors import RadixmeshError
from engine.sampling import SamplingParams
from engine.sched.grammar import Grammar
from engine.sched.stop import Finish, Stopper


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One prompt to be completed. tokens: the prompt's ids. seed: 64-bit, params.seed or one that was drawn.

    eos: ids that end a text unless params.ignore_eos. stopper: finds stop strings; the loop's side makes
    it. grammar: masks the vocabulary.
    arrival: seconds on the caller's clock. priority: larger is sooner. namespace: keeps prefix caches apart (adapter,
    tenant salt, weight version).
    """

    rid: str
    tokens: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    eos: frozenset[int] = frozenset()
    stopper: Stopper | None = None
    grammar: Grammar | None = None
    arrival: float = 0.0
    priority: int = 0
    namespace: Hashable = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """News of a request: tokens committed since the last, and how it ended, if it did. cached_tokens: prompt tokens
    that came from the prefix cache."""

    rid: str
    tokens: tuple[int, ...] = ()
    finish: Finish | None = None
    cached_tokens: int = 0
    error: RadixmeshError | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """A request's life: waiting, seated in a slot, and again waiting when it was preempted.

    epoch: counts its seatings; results of another epoch are never taken. fill: what must be fed before new tokens are
    made, the prompt and, after a preemption, the output so far. fed: tokens of `fill` planned. settled: positions in
    the cache by collected steps; lower and upper: bounds that count the steps in flight. pending: rows in flight;
    flying: those that make tokens; verifying: those with drafts. begun: a row of it was
    sent to the device. cold: the pool held it alone only without the prefix cache, which it uses no more. alone_until:
    after a device failure, run alone up to this position.
    """

    request: Request
    order: int
    epoch: int = 0
    state: Literal["waiting", "seated", "ended"] = "waiting"
    slot: int = -1
    cache: SequenceCache | None = None
    fill: Sequence[int] = ()
    start: int = -1
    fed: int = 0
    settled: int = 0
    lower: int = 0
    upper: int = 0
    pending: int = 0
    flying: int = 0
    verifying: int = 0
    cached: int = 0
    begun: bool = False
    cold: bool = False
    alone_until: int = 0
    out: list[int] = field(default_factory=list)
    checkpoints: dict[int, dict[int, int]] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        """Prompt and committed output."""
        return [*self.request.tokens, *self.out]

    @property
    def decoding(self) -> bool:
        """Whether all of `fill` has been planned."""
        return self.fed == len(self.fill)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a step, as commit needs it. fed: tokens; drafts: guesses among them; makes: whether it makes tokens;
    end: for a row of `fill`, how much of it is fed afterwards."""

    run: Run
    epoch: int
    fed: int
    drafts: int
    makes: bool
    end: int
