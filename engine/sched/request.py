"""A request, what comes back of it, and its life in the scheduler."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from engine.cache.sequence import SequenceCache
from engine.errors import RadixmeshError
from engine.sampling import SamplingParams
from engine.sched.grammar import Grammar
from engine.sched.scores import Scores
from engine.sched.stop import Finish, Stopper

if TYPE_CHECKING:
    from engine.sched.masks import Masks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One prompt to be completed. tokens: the prompt's ids. seed: 64-bit, params.seed or one that was drawn.

    eos: ids that end a text unless params.ignore_eos. stopper: finds stop strings; the loop's side makes
    it. grammar: masks the vocabulary. bad_words: params.bad_words as ids (Tokenizer.sequences).
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
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """News of a request: tokens committed since the last, and how it ended, if it did. cached_tokens: prompt tokens
    that came from the prefix cache. logprobs: of these tokens; prompt_logprobs: of the prompt, all at once with the
    first token; None where they weren't asked for."""

    rid: str
    tokens: tuple[int, ...] = ()
    finish: Finish | None = None
    cached_tokens: int = 0
    error: RadixmeshError | None = None
    logprobs: Scores | None = None
    prompt_logprobs: Scores | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """A request's life: waiting, seated in a slot, and again waiting when it was preempted.

    epoch: counts its seatings; results of another epoch are never taken. fill: what must be fed before new tokens are
    made, the prompt and, after a preemption, the output so far. fed: tokens of `fill` planned. settled: positions in
    the cache by collected steps; lower and upper: bounds that count the steps in flight. pending: rows in flight;
    flying: those that make tokens; verifying: those with drafts. begun: a row of it was
    sent to the device. alone_until: after a device failure, run alone up to
    this position. masks: what bounds its vocabulary. scores: of the prompt, as far as they came.
    """

    request: Request
    order: int
    masks: Masks | None = None
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
    alone_until: int = 0
    out: list[int] = field(default_factory=list)
    checkpoints: dict[int, dict[int, int]] = field(default_factory=dict)
    scores: Scores = field(default_factory=Scores)

    @property
    def tokens(self) -> list[int]:
        """Prompt and committed output."""
        return [*self.request.tokens, *self.out]

    @property
    def decoding(self) -> bool:
        """Whether all of `fill` has been planned."""
        return self.fed == len(self.fill)

    @property
    def made(self) -> int:
        """Tokens made before the next row's first, at least: committed ones and one for each row in flight."""
        return len(self.out) + self.flying

    @property
    def masked(self) -> bool:
        """Whether the next row's token has a mask. Such a row has no drafts, so `made` is exact as long as it has."""
        return self.masks is not None and self.masks.binds(self.made)

    @property
    def unscored(self) -> int:
        """The first position of the prompt whose logprob is wanted and has not come; the prompt's length if none is."""
        params, prompt = self.request.params, len(self.request.tokens)
        if params.prompt_logprobs is None:
            return prompt
        return min(prompt, params.logprob_start_len + 1 + len(self.scores))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a step, as commit needs it. fed: tokens; drafts: guesses among them; makes: whether it makes tokens;
    end: for a row of `fill`, how much of it is fed afterwards; made: Run.made, before it; score: the first position of
    the prompt that it scores, -1 = none."""

    run: Run
    epoch: int
    fed: int
    drafts: int
    makes: bool
    end: int
    made: int = 0
    score: int = -1
